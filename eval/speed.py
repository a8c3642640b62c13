"""What a training step costs over the network passes that it must make.

    python eval/speed.py
    python eval/speed.py --methods dmd2,sim --teacher FOLDER --set data=emoji gan=0 gan_critic=0

An update is recorded: every call of a network with its arguments, whether a gradient came back to it, to its weights or to
its input alone, and where it was stopped early. The bare time is that of these calls on their own, on the same networks
and arguments: each one's forward and backward pass, and at each player's turn the clipped gradient norm, the optimiser's
step, the gradients set to None and the moving averages; and nothing else, neither batches nor noise, schedules, losses,
checks and logs. `ratio` is the time of an update of the trainer over the bare time. Updates and bare passes take turns, and
a ratio is of two times right after each other: its median is kept, of whole cycles where the critic has more updates than
the generator. Every cycle repeats the same steps of the run, and so makes the same passes.

Memory is counted in bytes of tensors: the most that there is in a cycle, over the weights, the gradients of the player that
has most, optimiser states, averages, and the activations that the largest of the passes keeps for its backward.

On the CPU `ratio` is of the wall clock, and `cpu_ratio` the same of the process's CPU time, which another process on the
same core disturbs less. CUDA is timed by events; that part was never tried.
"""

import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from passes import Bare, Tape, networks_of

from onestep.cli import Parser
from onestep.config import resolve
from onestep.evaluate import append, check_output
from onestep.metrics.provenance import provenance
from onestep.objectives import objective_class
from onestep.plan_ledger import Ledger, bytes_of, tensors_of
from onestep.run import make_trainer
from onestep.teacher import facts_of
from onestep.trainer import Trainer

Clock = Callable[[Callable[[], None]], list[float]]
NAMES = ("ratio", "cpu_ratio")
METHODS = "dmd2,sim,lcm,scm,agd"
OWN = {"agd": {"trajectories": 64}}
"""Options of methods that would otherwise prepare for long."""


@dataclass
class Cycle:
    """Steps of a trainer after which the players' turns begin anew, and their passes without the trainer."""

    trainer: Trainer
    start: int
    bare: list[Bare]

    @classmethod
    def of(cls, trainer: Trainer) -> "Cycle":
        """Recorded from the first step on in which all players take part. Leaves the trainer there, a cycle older."""
        start = trainer.objective.settled
        length = getattr(trainer.objective.config, "ratio", 1)
        start += -start % length
        tapes = []
        for step in range(start, start + length):
            trainer.step = step
            tapes.append(Tape(trainer))
            with tapes[-1].recording():
                trainer.update()
        return cls(trainer, start, [Bare(tape) for tape in tapes])

    def passes(self) -> list[dict[str, Any]]:
        """Calls of each network by kind, and the samples in them as multiples of the micro-batch."""
        calls, rows = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
        for each in (each for bare in self.bare for each in bare.passes):
            key = (each.role, each.kind, each.stop or "")
            calls[key] += 1
            rows[key] += each.rows
        share = self.trainer.rows
        names = ("network", "kind", "stopped_at")
        return [dict(zip(names, key)) | {"calls": n, "batches": rows[key] / share} for key, n in calls.items()]

    def times(self, clock: Clock) -> list[list[float]]:
        """Readings of the trainer and of the bare passes, a step of the one after the same step of the other."""
        readings = []
        for step, passes in enumerate(self.bare, start=self.start):
            self.trainer.step = step
            readings.append([clock(self.trainer.update), clock(passes)])
        return np.sum(readings, axis=0).tolist()

    def memory(self) -> dict[str, float]:
        """Peak, what it is compared with, and their ratio. Optimisers must have their states."""
        trainer = self.trainer
        optimizers = [t for each in trainer.optimizers.values() for state in each.state.values() for t in state.values()]
        there = [*tensors_of(trainer.average, *(net for _, net in networks_of(trainer))), *optimizers]
        fixed = bytes_of({id(each): each for each in there}.values())
        with Ledger(there) as ledger:
            for step in range(self.start, self.start + len(self.bare)):
                trainer.step = step
                trainer.update()
        gradients = max(bytes_of(p for g in each.param_groups for p in g["params"]) for each in trainer.optimizers.values())
        kept = 0
        for bare in self.bare:
            for each in bare.passes:
                with Ledger(there) as one:
                    outputs = bare.one(each, each.forward)
                    kept = max(kept, one.live)
                del outputs
        needed = fixed + gradients + kept
        peak = fixed + ledger.peak
        return {"peak_bytes": peak, "needed_bytes": needed, "memory_ratio": peak / needed}


def clock_of(device: torch.device) -> Clock:
    """Seconds of a call: [wall clock, CPU time of the process], or on CUDA those between two events."""

    def host(call: Callable[[], None]) -> list[float]:
        start = time.perf_counter(), time.process_time()
        call()
        return [time.perf_counter() - start[0], time.process_time() - start[1]]

    def events(call: Callable[[], None]) -> list[float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1000]

    return events if device.type == "cuda" else host


def trainer_of(method: str, teacher: str, options: dict[str, Any], folder: Path) -> Trainer:
    """A trainer as `onestep.train` makes it. Raises ValueError for options that there are not or that do not fit."""
    recipe = {"method": method, "teacher": teacher, **OWN.get(method, {}), **options}
    facts = facts_of(teacher).options(method)
    config, own = resolve(objective_class(method).Config, facts, recipe, {"output": str(folder)}, "--set")
    return make_trainer(config, own)


def measure(trainer: Trainer, cycles: int, warmup: int = 2) -> dict[str, Any]:
    """The row of a trainer, without its name: passes, times, ratio, memory."""
    cycle, clock = Cycle.of(trainer), clock_of(trainer.accelerator.device)
    passes = cycle.passes()
    times = np.array([cycle.times(clock) for _ in range(warmup + cycles)][warmup:])  # (cycles, step or bare, clock)
    step, bare = np.median(times[:, :, 0], axis=0) / len(cycle.bare)
    return {
        "batch_size": trainer.config.batch_size,
        "updates_in_cycle": len(cycle.bare),
        "cycles": cycles,
        **quartiles(times[:, 0] / times[:, 1]),
        "step_s": float(step),
        "bare_s": float(bare),
        "images_per_s": trainer.config.batch_size / float(step),
        "passes": passes,
        **cycle.memory(),
    }


def against(trainer: Trainer, other: Trainer, cycles: int, warmup: int = 2) -> dict[str, Any]:
    """Time of `other`'s updates over that of `trainer`'s, the median and quartiles of cycles that take turns."""
    clock, both = clock_of(trainer.accelerator.device), [(each, Cycle.of(each)) for each in (trainer, other)]

    def times() -> list[list[float]]:
        return [np.sum([clock(update(each, step)) for step in steps(cycle)], axis=0).tolist() for each, cycle in both]

    def steps(cycle: Cycle) -> range:
        return range(cycle.start, cycle.start + len(cycle.bare))

    def update(each: Trainer, step: int) -> Callable[[], None]:
        each.step = step
        return each.update

    found = np.array([times() for _ in range(warmup + cycles)][warmup:])
    return {f"against_{name}": each for name, each in quartiles(found[:, 1] / found[:, 0]).items()}


def quartiles(ratios: np.ndarray) -> dict[str, Any]:
    """Median and quartiles over cycles, by the clock's name, of ratios (cycles, clocks)."""
    found = list(zip(NAMES, np.quantile(ratios, [0.25, 0.5, 0.75], axis=0).T.tolist()))
    return {name: each[1] for name, each in found} | {f"{name}_quartiles": [each[0], each[2]] for name, each in found}


def table(row: dict[str, Any]) -> str:
    lines = [f"{row['method']} on {row['teacher']}, batch {row['batch_size']}, {row['updates_in_cycle']} updates a cycle"]
    for each in row["passes"]:
        kind = each["kind"] + (f", to {each['stopped_at']}" if each["stopped_at"] else "")
        lines.append(f"  {each['network']:<8} {kind:<58} {each['calls']:>3} calls of {each['batches']:g} batches in all")
    lines.append(
        f"  step {1000 * row['step_s']:.1f} ms, bare {1000 * row['bare_s']:.1f} ms, {row['images_per_s']:.1f} images/s"
    )
    for name in (f"{kind}{name}" for kind in ("", "against_") for name in NAMES if f"{kind}{name}" in row):
        low, high = row[f"{name}_quartiles"]
        lines.append(f"  {name} {row[name]:.3f} ({low:.3f} to {high:.3f} in half of {row['cycles']} cycles)")
    mib = [row[name] / 2**20 for name in ("peak_bytes", "needed_bytes")]
    lines.append(f"  memory {mib[0]:.1f} MiB of tensors, {row['memory_ratio']:.2f} times {mib[1]:.1f} MiB")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--methods", default=METHODS, help="separated by commas (default: %(default)s)")
    parser.add_argument("--teacher", default="fashion", help="as for onestep.train (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of training, as in a recipe")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="OPTION=VALUE", help="time a step with these too, over one without them"
    )
    parser.add_argument("--cycles", type=int, default=20, help="that are timed (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("eval/speed.jsonl"), help="default: %(default)s")
    return parser.parse_args(argv)


def given(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """The values of OPTION=VALUE. Raises ValueError for one without a value."""
    if bad := [each for each in pairs if "=" not in each]:
        raise ValueError(f"{flag} {bad[0]} gives no value; type for example {flag} batch_size=8")
    return {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in pairs)}


def run(args: Namespace) -> None:
    """Prints a table and appends a row for each method. Raises ValueError for what cannot be measured."""
    check_output(args.output)
    if args.cycles < 1:
        raise ValueError(f"--cycles {args.cycles} is not allowed; type --cycles 1 or more")
    options, other = given("--set", args.set), given("--against", args.against)
    for method in args.methods.split(","):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(method, args.teacher, options, Path(folder) / "run")
            row = {"method": method, "teacher": args.teacher, "options": options, **measure(trainer, args.cycles)}
            if other:
                changed = trainer_of(method, args.teacher, options | other, Path(folder) / "other")
                row |= {"against": other, **against(trainer, changed, args.cycles)}
        row |= provenance(trainer.accelerator.device)
        print(table(row), flush=True)
        append(row, args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    args = parse(argv)
    try:
        run(args)
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
