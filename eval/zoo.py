"""Train methods for the same time on one teacher, score them alike, and tabulate.

python eval/zoo.py --teacher fashion --minutes 10 --output runs/zoo
python eval/zoo.py --teacher digits --minutes 2 --methods dmd2,sid --seeds 0,1,2 --output runs/zoo-digits
python eval/zoo.py --methods dmd2 --steps 1,2,4 --output runs/zoo

The entries are those of eval/zoo_<teacher>.yaml. --output holds a run of onestep.train for each entry and seed, zoo.jsonl
with a row for each of them and each number of steps that it is scored at, zoo.md with the table and zoo.png with their
pictures. The same command goes on where it was stopped; with more --steps it scores what is trained already.
"""

import json
import math
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from onestep.card import update_score
from onestep.cli import Parser
from onestep.config import TrainConfig, differences, flat, load_config, load_recipe, resolve, save_config
from onestep.denoiser import Denoiser, unwrap
from onestep.evaluate import append
from onestep.files import replaced
from onestep.log import keep_rows
from onestep.lora import Adapter
from onestep.methods import METHODS, config_class
from onestep.metrics import PROTOCOLS, evaluate, load_pipeline
from onestep.metrics.protocol import Protocol, protocol_of
from onestep.metrics.provenance import provenance
from onestep.metrics.render import render
from onestep.options import nearest
from onestep.run import export_name, export_run, finish, make_trainer
from onestep.saved import RESULTS_NAME
from onestep.teacher import facts_of, load_teacher
from onestep.trainer import Trainer

OURS = {"device": "cpu", "evaluate": False, "grid_every": 10**9, "log_every": 20}
"""Options of every run: it is scored here, and has one grid, at its end."""
RESERVED = {*OURS, "teacher", "data", "seed", "output", "iterations", "checkpoint_every"}
SCORES = ("precision", "recall", "density", "coverage", "class_accuracy")


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a method with options of its own, for one seed."""

    name: str
    method: str
    options: dict[str, Any]
    seed: int
    steps: tuple[int, ...] = ()
    """Network calls an image to score the student at; none: as many as it is trained with."""

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """What all entries share."""

    teacher: str
    data: str | None
    seconds: float
    """Of training, for each entry: CPU time of the process divided by its threads."""
    threads: int
    protocol: Protocol
    output: Path

    def folder(self, entry: Entry) -> Path:
        return self.output / f"{entry.name}-seed-{entry.seed}"

    def resolved(self, entry: Entry, iterations: int | None = None) -> tuple[TrainConfig, Any]:
        """Raises ValueError for options that there are not."""
        flags = OURS | {"seed": entry.seed, "output": str(self.folder(entry))}
        if self.data is not None:
            flags["data"] = self.data
        if iterations is not None:
            # ten checkpoints, so that a kill costs a tenth of the time at most
            flags |= {"iterations": iterations, "checkpoint_every": max(1, iterations // 10)}
        recipe = {"method": entry.method, "teacher": self.teacher, **entry.options}
        facts = facts_of(self.teacher).options(entry.method)
        return resolve(config_class(entry.method), facts, recipe, flags, f"the entry {entry.name}")


# ---- time and passes


class Stopped(Exception):
    """A signal asked the training to stop."""


def roles(trainer: Trainer) -> list[tuple[str, Any]]:
    """The members of all players, the teacher and what a method keeps beside them, each with its role."""
    members = [("student" if player == "generator" else player, each) for player, each in trainer.members.items()]
    members += [("teacher", [trainer.teacher.denoiser, *trainer.objective.kept()])]
    return [(role, member) for role, each in members for member in each]


class Passes:
    """Rows that enter each network while `on`, and those that come out again, by the network's role."""

    def __init__(self, trainer: Trainer):
        self.on = False
        self.entered: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self._networks = [(role, unwrap(m.network)) for role, m in roles(trainer) if isinstance(m, Denoiser)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = []
        for role, network in self._networks:
            count = partial(self._count, role, isinstance(network, Adapter))
            hooks.append(network.register_forward_pre_hook(lambda _, args, count=count: count(self.entered, len(args[0]))))
            hooks.append(network.register_forward_hook(lambda _, args, out, count=count: count(self.left, len(args[0]))))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, role: str, adapter: bool, counts: dict[str, int], rows: int) -> None:
        if self.on:
            counts[role] = counts.get(role, 0) + rows
            if adapter:  # the teacher's network, which does its work, is counted as well
                counts["teacher"] = counts.get("teacher", 0) - rows


class Timed(Trainer):
    """A trainer that knows what its own updates cost: `seconds` of CPU time per thread, `wall_seconds`, and passes.

    costs.jsonl has all of that at each checkpoint, so that a resumed run goes on counting. What was done after the
    checkpoint that it goes on from is not in its weights and not in its costs.
    """

    def __init__(self, config: TrainConfig, options: Any):
        made = make_trainer(config, options)
        super().__init__(config, made.teacher, made.generator, made.objective, made.data, made.folder)
        self.seconds = self.wall_seconds = 0.0
        self.passes = Passes(self)

    def run(self) -> bool:
        with self.passes.watching():
            return super().run()

    def update(self) -> None:
        wall, before = time.perf_counter(), seconds()
        self.passes.on = True
        super().update()
        self.passes.on = False
        self.seconds += seconds() - before
        self.wall_seconds += time.perf_counter() - wall

    @property
    def _costs(self) -> Path:
        return self.folder / "costs.jsonl"

    def save(self) -> None:
        # before the checkpoint: a row without a checkpoint is dropped by `resume`, a checkpoint without a row is not
        counts = {"entered": self.passes.entered, "left": self.passes.left}
        append({"step": self.step, "seconds": self.seconds, "wall_seconds": self.wall_seconds, **counts}, self._costs)
        super().save()

    def resume(self) -> None:
        super().resume()
        keep_rows(self._costs, self.step)
        if self.step:
            found = rows_of(self._costs)
            if not found or found[-1]["step"] != self.step:
                raise ValueError(f"{self._costs} does not know step {self.step}: delete {self.folder} to start over")
            self.seconds, self.wall_seconds = found[-1]["seconds"], found[-1]["wall_seconds"]
            self.passes.entered, self.passes.left = found[-1]["entered"], found[-1]["left"]

    def per_step(self) -> dict[str, Any]:
        """Forward passes of each network a step, in units of one batch, and how many of them were stopped at a feature."""
        unit = self.config.batch_size * self.step
        entered = {role: count / unit for role, count in self.passes.entered.items()}
        stopped = {role: (count - self.passes.left.get(role, 0)) / unit for role, count in self.passes.entered.items()}
        return {"passes": entered, "partial_passes": {role: count for role, count in stopped.items() if count}}


def seconds() -> float:
    """CPU time of this process per thread: the clock of a machine that has nothing else to do."""
    return time.process_time() / torch.get_num_threads()


# ---- the plan


@dataclass
class Plan:
    """How many steps fill the time, from a measurement before the first; kept in the run's folder."""

    minutes: float
    threads: int
    iterations: int
    seconds_per_step: float
    """Measured, where all players take their turns."""
    planned_seconds: float
    commits: list[str | None] = field(default_factory=list)
    """Under which it was trained: several where the code has changed before it was resumed."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / "plan.json") as draft:
            draft.write_text(json.dumps(asdict(self)) + "\n")


def plan_of(job: Job, entry: Entry) -> Plan:
    """The plan in the run's folder, or a new one. Raises ValueError for another job's, and for too little time."""
    folder, minutes = job.folder(entry), job.seconds / 60
    commit = provenance("cpu")["commit"]
    if (folder / "plan.json").is_file():
        plan = Plan(**json.loads((folder / "plan.json").read_text()))
        if (plan.minutes, plan.threads) != (minutes, job.threads):
            raise ValueError(
                f"{folder} was planned for {plan.minutes:g} minutes on {plan.threads} threads; type --minutes "
                f"{plan.minutes:g} --threads {plan.threads}, or another --output"
            )
    else:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other things than a run of this script; type another --output")
        plan = measured(job, entry)
    if commit not in plan.commits:
        plan.commits.append(commit)
        plan.save(folder)
    return plan


def measured(job: Job, entry: Entry) -> Plan:
    """Times some steps of a trainer that is thrown away; with backtracking, those of its recording apart from the rest."""
    config, options = job.resolved(entry, iterations=10**9)  # no end is known yet
    with tempfile.TemporaryDirectory() as scratch:
        config = replace(config, output=scratch)
        trainer = make_trainer(config, options)
        given = flat(config, options)
        cycle, recording, settled = given.get("ratio", 1), given.get("backtrack", 0), trainer.objective.settled
        enough = min(20.0, job.seconds / 10)
        early = per_step(trainer, 0, 1, enough / 4) if recording else 0.0
        late = per_step(trainer, -(-settled // cycle) * cycle, cycle, enough)
    iterations = max(1, int(recording + (job.seconds - recording * early) / late))
    if iterations <= settled:
        raise ValueError(
            f"{job.seconds / 60:g} minutes are {max(0, iterations)} steps of {entry.name}, whose last stage begins at step "
            f"{settled}: type more --minutes, or give the entry a smaller backtrack, segment_steps or reflow_steps"
        )
    planned = recording * early + (iterations - recording) * late
    return Plan(job.seconds / 60, job.threads, iterations, late, planned)


def per_step(trainer: Trainer, start: int, cycle: int, enough: float) -> float:
    """Mean `seconds` of an update, over whole cycles of `cycle` updates from step `start` on, but for the first cycle."""

    def run() -> None:
        for _ in range(cycle):
            trainer.update()
            trainer.step += 1

    trainer.step = start
    run()
    count, before = 0, seconds()
    while count < 2 or seconds() - before < enough:
        run()
        count += 1
    return (seconds() - before) / (count * cycle)


# ---- one entry


def scored(job: Job, entry: Entry, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of an entry that are not in `rows`, one for each number of steps, as they are made.

    It is trained to its end from wherever it was. A run that comes to no end in finite numbers has one row, of its error.
    Raises Stopped where a signal asked to, ValueError for options that do not fit and for a folder with a run of others.
    """
    wanted = entry.steps or (job.resolved(entry)[0].student_steps,)
    if missing := [steps for steps in wanted if not done(rows, job, entry, steps)]:
        yield from train(job, entry, missing)


def train(job: Job, entry: Entry, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows of `scored` for these numbers of steps."""
    plan = plan_of(job, entry)
    config, options = job.resolved(entry, plan.iterations)
    folder = job.folder(entry)
    if (folder / "config.yaml").is_file():
        changed = differences(load_config(folder), flat(config, options), type(options))
        if changed:
            raise ValueError(f"{folder} holds a run of other options ({'; '.join(changed)}); type another --output")
    save_config(folder, config, options)
    print(f"{entry.title}: {plan.iterations} steps of {plan.seconds_per_step * 1000:.0f} ms")
    row: dict[str, Any] = {
        "name": entry.name,
        "method": entry.method,
        "options": entry.options,
        "teacher": job.teacher,
        "data": config.data,
        "seed": entry.seed,
        "minutes": plan.minutes,
        "iterations": plan.iterations,
        "batch_size": config.batch_size,
        "planned_seconds": plan.planned_seconds,
    }
    trainer = Timed(config, options)
    try:
        if not trainer.run():
            raise Stopped
    except FloatingPointError as error:
        facts = provenance("cpu") | {"commit": commits(plan)}
        yield {**row, "error": " ".join(str(error).split(";")[0].split()), **facts}
        return
    row |= {
        "seconds": trainer.seconds,
        "wall_seconds": trainer.wall_seconds,
        "images_per_second": config.batch_size * trainer.step / trainer.seconds,
        **trainer.per_step(),
        "picture": f"{folder.name}/grid.png",
    }
    own = len(trainer.generator.times)
    if own in counts or not (folder / "export").exists():
        finish(trainer, options)
    for steps in counts:
        export = folder / export_name(None if steps == own else steps)
        if steps != own:
            export_run(folder, export, steps=steps)
        scores = evaluate(export, job.protocol, steps=steps, guidance=1.0, precision_recall=True)
        update_score(export, scores)
        if steps == own:
            (folder / RESULTS_NAME).write_text(json.dumps(scores) + "\n")
        yield {**row, **scores, "commit": commits(plan)}


def commits(plan: Plan) -> str | None:
    return ", ".join(str(each) for each in plan.commits) if plan.commits != [None] else None


# ---- rows


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file, if there is one."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def done(rows: list[dict[str, Any]], job: Job, entry: Entry, steps: int) -> bool:
    """Whether there is a row of this entry at so many steps, or of its error. Raises ValueError for one of another job."""
    for row in rows:
        if (row["name"], row["seed"]) == (entry.name, entry.seed):
            asked = {"teacher": job.teacher, "minutes": job.seconds / 60, "method": entry.method, "options": entry.options}
            other = {key: row[key] for key, value in asked.items() if row[key] != value}
            if other:
                raise ValueError(f"{job.output}/zoo.jsonl has a row of {entry.title} with {other}; type another --output")
            if row.get("steps", steps) == steps:
                return True
    return False


# ---- what a person sees


def metric_of(row: dict[str, Any]) -> float | None:
    """FD, or None for a run that ended in an error."""
    return row.get(row["protocol"]["metric"]) if "protocol" in row else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for eval/RESULTS.md: what the rows share in a line, then one line a row, then means over seeds."""
    scored = [row for row in rows if "protocol" in row]
    shared = {
        "teacher": {row["teacher"] for row in rows},
        "minutes of CPU time per thread": {f"{row['minutes']:g}" for row in rows},
        "batch size": {row["batch_size"] for row in rows},
        "protocol": {row["protocol"]["name"] for row in scored},
        "machine": {f"{row['machine']['cpu']}, {row['machine']['threads']} threads, torch {row['torch']}" for row in rows},
    }
    lines = [
        "; ".join(f"{key} {' / '.join(map(str, sorted(values)))}" for key, values in shared.items() if values) + ".",
        "",
    ]
    titles = ["method", "options", "seed", "steps", "FD", "precision", "recall", "density", "coverage", "class accuracy"]
    titles += ["passes a step: student, teacher, others", "images/s", "iterations", "seconds (planned)", "commit", "picture"]
    lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    summary = over_seeds(scored)
    return "\n".join(lines + (["", *summary] if summary else [])) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    options = ", ".join(f"{key} {value}" for key, value in row["options"].items())
    if row["name"] != row["method"]:
        options = ", ".join(filter(None, (f"method {row['method']}", options)))
    start, commit = [row["name"], options or "-", str(row["seed"]), str(row.get("steps", "-"))], str(row["commit"])
    short = ", ".join(each[:7] + "-dirty" * each.endswith("-dirty") for each in commit.split(", "))
    if "protocol" not in row:
        return [*start, row["error"], *["-"] * 7, str(row["iterations"]), "-", short, "-"]
    passes = {"student": 0.0, "teacher": 0.0, **row["passes"]}
    shown = ", ".join(
        f"{count:.2f}" + (f" ({partial:.2f} partial)" if (partial := row["partial_passes"].get(role)) else "")
        for role, count in passes.items()
    )
    return [
        *start,
        f"{metric_of(row):.2f}",
        *[f"{row[name]:.3f}" for name in SCORES[:-1]],
        f"{row['class_accuracy']:.1%}".replace("%", " %"),
        shown,
        f"{row['images_per_second']:.0f}",
        str(row["iterations"]),
        f"{row['seconds']:.0f} ({row['planned_seconds']:.0f})",
        short,
        f"[grid]({row['picture']})",
    ]


def over_seeds(rows: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over the seeds of each entry and number of steps that has several."""
    alike: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["name"], row["steps"]), []).append(row)
    several = {key: found for key, found in alike.items() if len(found) > 1}
    if not several:
        return []
    titles = ["mean ± standard deviation", "steps", "seeds", "FD", "precision", "recall", "density", "coverage"]
    lines = ["| " + " | ".join([*titles, "class accuracy"]) + " |", "|---" * 9 + "|"]
    for (name, steps), found in several.items():
        values = [[metric_of(row) or 0.0 for row in found], *([row[score] for row in found] for score in SCORES)]
        shown = [f"{mean(each):.3f} ± {stdev(each):.3f}" for each in values]
        lines.append(f"| {name} | {steps} | {len(found)} | {' | '.join(shown)} |")
    return lines


@torch.no_grad()
def contact_sheet(rows: list[dict[str, Any]], job: Job, path: Path, each: int = 2) -> None:
    """A column of pictures for each entry and number of steps, of its first seed, after one of the teacher.

    In a line the noise and the class are the same.
    """
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if "protocol" in row:
            first.setdefault((row["name"], row["steps"]), row)
    if not first:
        return
    labels = [i // each for i in range(each * job.protocol.classes)]
    seeds, columns = list(range(len(labels))), {}
    teacher = load_teacher(job.teacher)
    # the noise of the stock pipelines, which draw one picture's from one generator
    z = torch.cat([torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    steps = teacher.facts.steps
    x_0 = teacher.sample(z, *teacher.encode(torch.tensor(labels)), teacher.facts.guidance, steps)
    columns[f"teacher\n{steps} steps"] = teacher.to_images(x_0)
    names = [name for name, _ in first]
    for (name, count), row in first.items():
        pipe = load_pipeline(job.output.joinpath(*Path(row["export"]).parts[-2:]))
        images = torch.cat(list(render(pipe, labels, seeds, count, 1.0, len(seeds))))
        title = f"{name}, {count} step{'s' * (count > 1)}" if names.count(name) > 1 else name
        columns[f"{title}\n{row['protocol']['metric']} {metric_of(row):.2f}"] = images
    save_columns(path, columns)


def save_columns(path: Path, columns: dict[str, Tensor]) -> None:
    """Columns of images (N, C, H, W) in [0, 1] under their titles of two lines, small ones enlarged, as PNG."""
    font, gap, top = ImageFont.load_default(size=14), 12, 44
    strips = []
    for images in columns.values():
        tiled = make_grid(images.clamp(0, 1), nrow=1, padding=1, pad_value=1.0)
        strip = Image.fromarray((tiled * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        scale = max(1, 64 // images.shape[-1])
        strips.append(strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST))
    widths = [
        max(strip.width, *(math.ceil(font.getlength(line)) for line in title.split("\n"))) + gap
        for strip, title in zip(strips, columns)
    ]
    sheet = Image.new("RGB", (sum(widths), max(strip.height for strip in strips) + top), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for strip, title, width in zip(strips, columns, widths):
        middle = x + width // 2
        sheet.paste(strip, (middle - strip.width // 2, top))
        draw.multiline_text((middle, top // 2), title, fill="black", font=font, anchor="mm", align="center")
        x += width
    with replaced(path) as draft:
        sheet.save(draft, format="png")


# ---- the command line


def entries_in(path: Path | None, methods: Sequence[str] | None) -> dict[str, Entry]:
    """Entries of seed 0 by name: those of the file, or of them and of the plain methods the ones that are asked for.

    Raises ValueError for a file that is no list of entries, and for names that are nowhere.
    """
    found: dict[str, Entry] = {}
    for name, given in (load_recipe(path) if path else {}).items():
        if not isinstance(given, dict | None):
            raise ValueError(f"{name} in {path} is no mapping; allowed are lines like '{name}: {{method: dmd2, gan: 0}}'")
        if Path(name).name != name:
            raise ValueError(f"{name!r} in {path} is no name of a folder; type one without slashes")
        options = dict(given or {})
        method = options.pop("method", name)
        # a list; a number is an option of methods that have one of this name
        steps = options.pop("steps") if isinstance(options.get("steps"), list) else []
        if wrong := sorted(RESERVED & set(options)):
            raise ValueError(f"{', '.join(wrong)} of {name} in {path}: that is the same for all; leave it out")
        found[name] = Entry(name, method, options, 0, steps_in(steps, f"steps of {name} in {path}"))
    if methods is None:
        if not found:
            raise ValueError("no file of entries for this teacher; type --methods with some, or --entries FILE")
        return found
    for name in methods:
        if name not in found and name not in METHODS:
            known = {*found, *METHODS}
            raise ValueError(f"no method {name!r}; allowed are {', '.join(sorted(known))}{nearest(name, known)}")
    return {name: found.get(name, Entry(name, name, {}, 0)) for name in methods}


def steps_in(given: list[Any], label: str) -> tuple[int, ...]:
    """Numbers of steps, without repetitions. Raises ValueError where they are no integers from 1."""
    if not all(type(each) is int and each >= 1 for each in given):
        raise ValueError(f"{label}: {given!r} is not allowed; allowed are integers from 1: type for example 1,2,4")
    return tuple(dict.fromkeys(given))


def protocol_for(teacher: str, data: str | None, name: str | None) -> Protocol:
    """The one of that name, the teacher's, or the one whose real images are the data. Raises ValueError for none."""
    facts = facts_of(teacher)
    if name or facts.protocol:
        return protocol_of(name or str(facts.protocol))
    source = data or facts.train.get("data")
    for protocol in PROTOCOLS.values():
        if protocol.real == source:
            return protocol
    raise ValueError(f"no protocol is known for {teacher}; type --protocol with one of {', '.join(PROTOCOLS)}")


def parse(argv: Sequence[str] | None) -> tuple[Job, list[Entry]]:
    """Raises ValueError for what does not fit together; nothing is written."""
    reader = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    reader.add_argument("--teacher", default="fashion", help="known teacher or diffusers folder (default: %(default)s)")
    reader.add_argument("--minutes", type=float, default=10.0, help="of training, each (default: %(default)s)")
    reader.add_argument("--methods", help="entries or methods, separated by commas (default: all entries)")
    reader.add_argument("--seeds", default="0", help="separated by commas (default: %(default)s)")
    reader.add_argument("--steps", help="to score students at, separated by commas (default: each entry's own)")
    reader.add_argument("--data", help="as in onestep.train (default: the teacher's)")
    reader.add_argument("--entries", type=Path, metavar="FILE", help="default: eval/zoo_<teacher>.yaml")
    reader.add_argument("--protocol", help="default: the teacher's, or the one of its data")
    reader.add_argument("--threads", type=int, help="of torch (default: as it chooses)")
    reader.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    given = reader.parse_args(argv)
    own = Path(__file__).with_name(f"zoo_{Path(given.teacher).name}.yaml")
    entries = entries_in(given.entries or (own if own.is_file() else None), given.methods and given.methods.split(","))
    seeds = given.seeds.split(",")
    if not 0 < given.minutes < math.inf or not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--minutes {given.minutes} --seeds {given.seeds}: allowed are minutes above 0 and integers from 0")
    if given.steps is not None:
        counts = [int(each) if each.isdecimal() else each for each in given.steps.split(",")]
        entries = {name: replace(entry, steps=steps_in(counts, "--steps")) for name, entry in entries.items()}
    if given.threads is not None:
        if given.threads < 1:
            raise ValueError(f"--threads {given.threads} is not allowed; type 1 or more")
        torch.set_num_threads(given.threads)
    job = Job(
        teacher=given.teacher,
        data=given.data,
        seconds=given.minutes * 60,
        threads=torch.get_num_threads(),
        protocol=protocol_for(given.teacher, given.data, given.protocol),
        output=given.output,
    )
    made = [replace(entry, seed=int(seed)) for seed in dict.fromkeys(seeds) for entry in entries.values()]
    for entry in made:
        job.resolved(entry)
    return job, made


def compare(job: Job, entries: Sequence[Entry]) -> int:
    """All entries in turn; what is there already is passed over. Returns the exit code."""
    path, failed = job.output / "zoo.jsonl", False
    rows = rows_of(path)
    for entry in entries:  # of another job
        done(rows, job, entry, 0)
    for entry in entries:
        try:
            for row in scored(job, entry, rows):
                append(row, path)
                rows.append(row)
                (job.output / "zoo.md").write_text(table(rows), encoding="utf-8")
        except Stopped:
            print(f"stopped in {entry.title}; the same command goes on from there")
            return 130
        except ValueError as error:
            failed = True
            print(f"error: {entry.title}: {' '.join(str(error).split())}", file=sys.stderr)
    if rows:
        (job.output / "zoo.md").write_text(table(rows), encoding="utf-8")
        contact_sheet(rows, job, job.output / "zoo.png")
        print(table(rows))
    return 2 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    try:
        job, entries = parse(argv)
        job.output.mkdir(parents=True, exist_ok=True)
        with FileLock(job.output / ".lock", timeout=0):
            return compare(job, entries)
    except Timeout:
        print(f"error: another process is at work in {job.output}; wait, or type another --output", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
