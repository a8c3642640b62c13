"""Scores along a training: how much of it a method takes to reach an FD.

python eval/curve.py --teacher digits --minutes 3 --methods dmd2,disback-dmd2 --seeds 0,1,2 --output runs/curve

Methods are trained as by eval/zoo.py, whose options these are. --points times a run its averaged student is exported and
scored as the finished one would be; the time for that is not counted. --output holds a folder a run with its curve.jsonl,
curve.md with the time to each of --targets, and curve.png. The same command goes on where it was stopped.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from filelock import FileLock, Timeout
from zoo import Entry, Job, Timed, parse, plan_of, rows_of

from onestep.cli import Parser
from onestep.config import save_config
from onestep.evaluate import append
from onestep.exporting import export
from onestep.log import keep_rows
from onestep.metrics import evaluate
from onestep.run import DTYPES, card_of

matplotlib.use("Agg")
from matplotlib import pyplot

Curve = list[dict[str, Any]]
"""Rows with `step`, `seconds` of CPU time per thread, and the scores there."""
Curves = list[tuple[Entry, Curve]]


class Scored(Timed):
    """A trainer that scores its averaged student at every checkpoint."""

    score: Callable[[Path], dict[str, Any]]
    options: Any

    def save(self) -> None:
        folder, config = self.folder / "scored", self.config
        export(self.averaged(), self.teacher, folder, DTYPES["fp32"], card_of(config, self.options, self.teacher))
        row = {"step": self.step, "seconds": self.seconds, **self.score(folder)}
        append(row, self.folder / "curve.jsonl")  # before the checkpoint: `resume` drops a row without one
        super().save()

    def resume(self) -> None:
        super().resume()
        keep_rows(self.folder / "curve.jsonl", self.step)


def curve(job: Job, entry: Entry, points: int, count: int | None) -> Curve | None:
    """The curve of an entry, trained to its end from wherever it was; None where a signal asked to stop."""
    plan = plan_of(job, entry)
    config, options = job.resolved(entry, plan.iterations)
    config = replace(config, checkpoint_every=max(1, plan.iterations // points))
    rows = rows_of(config.folder / "curve.jsonl")
    if not rows or rows[-1]["step"] < plan.iterations:
        save_config(config.folder, config, options)
        trainer = Scored(config, options)
        trainer.options, steps = options, len(trainer.generator.times)
        trainer.score = lambda folder: evaluate(folder, job.protocol, steps=steps, guidance=1.0, count=count)
        if not trainer.run():
            return None
    return rows_of(config.folder / "curve.jsonl")


def reached(rows: Curve, metric: str, target: float) -> float | None:
    """Seconds until the metric is first at or below `target`, linear between points; None where it never is."""
    before = None
    for row in rows:
        if row[metric] <= target:
            if before is None:
                return float(row["seconds"])
            part = (before[metric] - target) / (before[metric] - row[metric])
            return float(before["seconds"] + part * (row["seconds"] - before["seconds"]))
        before = row
    return None


def table(curves: Curves, metric: str, targets: Sequence[float]) -> str:
    """Markdown: by method, seconds to each target, mean and standard deviation over the seeds that reached it."""
    names = list(dict.fromkeys(entry.name for entry, _ in curves))
    titles = [f"seconds to {metric} {target:g}" for target in targets]
    lines = ["| " + " | ".join(["method", "seeds", *titles, f"{metric} at the end"]) + " |"]
    lines.append("|---" * (len(titles) + 3) + "|")
    for name in names:
        own = [rows for entry, rows in curves if entry.name == name]
        cells = []
        for target in targets:
            times = [time for rows in own if (time := reached(rows, metric, target)) is not None]
            cells.append(f"{spread(times)} ({len(times)} of {len(own)})" if times else f"never (0 of {len(own)})")
        seeds = ", ".join(str(entry.seed) for entry, _ in curves if entry.name == name)
        lines.append("| " + " | ".join([name, seeds, *cells, spread([rows[-1][metric] for rows in own])]) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def plot(curves: Curves, metric: str, path: Path) -> None:
    """The metric against seconds on a logarithmic axis, one colour a method and one line a seed."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    names = list(dict.fromkeys(entry.name for entry, _ in curves))
    for entry, rows in curves:
        first = entry.seed == min(each.seed for each, _ in curves if each.name == entry.name)
        axes.plot(
            [row["seconds"] for row in rows],
            [row[metric] for row in rows],
            color=f"C{names.index(entry.name)}",
            alpha=0.8,
            marker=".",
            label=entry.name if first else None,
        )
    axes.set(yscale="log", xlabel="training, seconds of CPU time per thread", ylabel=metric)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    reader = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    reader.add_argument("--points", type=int, default=20, help="scores along a run (default: %(default)s)")
    reader.add_argument("--count", type=int, help="images for each score (default: the protocol's)")
    reader.add_argument("--targets", required=True, help="values of the metric, separated by commas")
    try:
        given, rest = reader.parse_known_args(argv)
        job, entries = parse(rest)
        targets = sorted((float(each) for each in given.targets.split(",")), reverse=True)
        job.output.mkdir(parents=True, exist_ok=True)
        curves: Curves = []
        with FileLock(job.output / ".lock", timeout=0):
            for entry in entries:
                rows = curve(job, entry, given.points, given.count)
                if rows is None:
                    return 130
                curves.append((entry, rows))
        metric = job.protocol.metric
        if metric not in curves[0][1][0]:  # fewer images than the protocol's make another number
            metric += "_proxy"
        (job.output / "curve.md").write_text(shown := table(curves, metric, targets), encoding="utf-8")
        plot(curves, metric, job.output / "curve.png")
        print(shown)
        return 0
    except Timeout:
        print(f"error: another process is at work in {job.output}; wait, or type another --output", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
