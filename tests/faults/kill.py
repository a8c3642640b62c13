"""python tests/faults/kill.py --rounds 50: kill runs at random moments, resume them, and compare with one that was not.

A round is one SIGKILL, of all processes of a run at once, half of them while a checkpoint is being written. After each
there must be a whole checkpoint, or none yet, and nothing damaged; the run then goes on. A run that has reached its end
must have the weights and the optimisers' states of an unkilled run bit for bit, and each row of its metrics once.
"""

import argparse
import json
import logging
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from background import TINY, finished, start

from onestep.checkpoint import latest_checkpoint

VOLATILE = ("images_per_second",)
"""What a row of metrics says of the clock."""


@dataclass
class Ending:
    """What is left of a run at its end: its last checkpoint, its metrics, and the steps of its TensorBoard curve."""

    files: dict[str, bytes]
    rows: list[dict[str, Any]]
    curve: dict[int, float]

    @classmethod
    def of(cls, run: Path) -> "Ending":
        last = latest_checkpoint(run / "checkpoints")
        assert last is not None, f"{run} has ended without a checkpoint"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]
        return cls({path.name: path.read_bytes() for path in sorted(last.iterdir())}, kept, curve_of(run))

    def differences(self, other: "Ending") -> list[str]:
        """In words, what another run has ended with otherwise."""
        found = [name for name in {*self.files, *other.files} if self.files.get(name) != other.files.get(name)]
        found += [f"metrics.jsonl, {len(other.rows)} rows"] * (self.rows != other.rows)
        return found + [f"TensorBoard, steps {sorted(other.curve)}"] * (self.curve != other.curve)


def curve_of(run: Path) -> dict[int, float]:
    """The curve of the learning rate as TensorBoard shows it. Raises AssertionError for a step that is there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every resume
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    scalars = events.Scalars("lr")
    assert len({scalar.step for scalar in scalars}) == len(scalars), f"a step is twice in {run}/tensorboard"
    return {scalar.step: scalar.value for scalar in scalars}


def started(argv: Sequence[str], log: Path, processes: int) -> list[BaseProcess]:
    """A run by so many processes."""
    if processes == 1:
        return [start(argv, log)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [start(argv, log.with_name(f"{log.name}-{number}"), rank) for number, rank in enumerate(ranks)]


def wait(run: Path, processes: Sequence[BaseProcess], took: float, source: random.Random) -> bool:
    """Until a random moment of a run's training or of its saving; whether it is still running then."""
    saving = source.random() < 0.5
    until = time.monotonic() + source.uniform(0, took)
    while all(each.is_alive() for each in processes):
        late = time.monotonic() >= until
        if late and (not saving or list(run.glob("checkpoints/.step-*.tmp"))):
            time.sleep(source.uniform(0, 0.01) if saving else 0)
            return True
        time.sleep(0.0005)
    return False


def kill(processes: Sequence[BaseProcess]) -> None:
    for each in processes:
        each.kill()
    for each in processes:
        each.join()


def play(argv: Sequence[str], rounds: int, processes: int, folder: Path, seed: int = 0) -> list[str]:
    """The losses in so many rounds, in words; none where all went well. `argv` is a run but for its --output."""
    source, began = random.Random(seed), time.monotonic()
    codes = [finished(each) for each in started([*argv, "--output", str(folder / "whole")], folder / "log", processes)]
    assert codes == [0] * processes, f"the run that was not killed has failed: see {folder}"
    took, whole = time.monotonic() - began, Ending.of(folder / "whole")
    killed, ended, losses, run = 0, 0, list[str](), folder / "run"
    while killed < rounds or run.exists():
        group = started([*argv, "--output", str(run)], folder / "log", processes)
        if killed < rounds and wait(run, group, took, source):
            kill(group)
            killed += 1
            losses += damage(run, killed)
            continue
        codes, ended = [finished(each) for each in group], ended + 1
        if codes != [0] * processes:
            losses.append(f"after {killed} kills: a resumed run ends with {codes}, see {folder / 'log'}")
        else:
            losses += [f"after {killed} kills: {each} differs" for each in whole.differences(Ending.of(run))]
        if losses:
            break
        shutil.rmtree(run)
    print(f"{killed} kills of {processes}-process runs, {ended} runs to their end, {len(losses)} losses", flush=True)
    return losses


def damage(run: Path, killed: int) -> list[str]:
    """What a kill has left that is no whole checkpoint."""
    folder = run / "checkpoints"
    newest = max(folder.glob("step-*"), default=None)
    try:
        whole = latest_checkpoint(folder, aloud=False)
    except ValueError as error:
        return [f"kill {killed}: {error}"]
    return [f"kill {killed}: {newest} is damaged"] if whole != newest else []


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("--rounds", type=int, default=50, help="kills in all, half of them of two processes")
    reader.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    given = reader.parse_args()
    print(f"--seed {given.seed}", flush=True)
    argv = [
        *TINY,
        "--teacher",
        "digits",
        "--iterations",
        "30",
        "--checkpoint-every",
        "2",
        "--log-every",
        "1",
        "--no-evaluate",
    ]
    losses = []
    for processes, rounds in ((1, given.rounds - given.rounds // 2), (2, given.rounds // 2)):
        folder = Path(tempfile.mkdtemp(prefix="onestep-kill-"))
        found = play(argv, rounds, processes, folder, given.seed) if rounds else []
        losses += found
        if not found:
            shutil.rmtree(folder)
    print("\n".join(losses) or "no run was lost")
    return int(bool(losses))


if __name__ == "__main__":
    sys.exit(main())
