"""Which options make a run fit."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .config import TrainConfig
from .plan_ledger import Turn
from .plan_memory import Memory, Run
from .plan_teacher import Blank

RESOLUTIONS = (0.75, 0.5, 0.25)
"""Smaller sides that are tried, as fractions of the present one."""


class Planner:
    """Memory of a run with some of its options changed."""

    def __init__(self, config: TrainConfig, options: Any, processes: int = 1):
        """Raises ValueError where the teacher cannot be had."""
        self.config, self.options, self.processes = config, options, processes
        self.blank = Blank(config.teacher)
        self._known: dict[tuple[tuple[str, Any], ...], Memory] = {}
        self._runs: dict[tuple[tuple[str, Any], ...], Run] = {}  # those that are not measured yet
        self._measured: dict[str, dict[str, Turn]] = {}

    def memory(self, changes: Mapping[str, Any], limit: float = float("inf")) -> Memory:
        """Memory with these options in place of the present ones; turns are measured only while the rest is in `limit`.

        Raises ValueError where the options do not fit the teacher.
        """
        key = tuple(sorted(changes.items()))
        if key not in self._known:
            run = Run(replace(self.config, **changes), self.options, self.blank, self.processes)
            self._known[key], self._runs[key] = run.memory(), run
        found = self._known[key]
        if key in self._runs and found.total <= limit:
            found.turns.setdefault("grid", self._runs[key].grid())
            if found.total <= limit:
                found.turns = self._turns(self._runs.pop(key)) | found.turns
        return found

    def _turns(self, run: Run) -> dict[str, Turn]:
        # the slowest part by far; it does not depend on optimisers, nor on how many micro-batches there are beyond one
        key = repr((replace(run.config, optimizer="adamw", accumulation=1), run.rows, run.config.accumulation > 1))
        if key not in self._measured:
            self._measured[key] = run.turns()
        return self._measured[key]

    def changes(self) -> Iterator[dict[str, Any]]:
        """What can be changed, one option each and the smallest change first.

        The first leave the losses as they are, the next round numbers, the last train something else.
        """
        c = self.config
        wanted: list[tuple[str, Any]] = [("gradient_checkpointing", True)]
        wanted += [("accumulation", c.batch_size // self.processes), ("weights", "bf16")]
        if c.device != "cpu":
            wanted.append(("optimizer", "adamw8bit"))
        wanted += [("mixed_precision", "bf16"), ("critic", "lora"), ("student", "lora")]
        wanted += [("resolution", side) for side in self._sides()]
        for name, value in wanted:
            if getattr(c, name) not in (value, "paged-adamw8bit") and self._possible({name: value}):
                yield {name: value}

    def _sides(self) -> list[int]:
        teacher = self.blank.teacher(_dtype(self.config), self.config.resolution)
        cell = teacher.pixels_per_cell
        sides = [round(teacher.resolution * part / cell) * cell for part in RESOLUTIONS]
        return [side for side in sides if 0 < side < teacher.resolution] if teacher.any_resolution else []

    def _possible(self, changes: Mapping[str, Any]) -> bool:
        try:
            self.memory(changes, limit=0)
        except ValueError:
            return False
        return True

    def fit(self, limit: int) -> tuple[dict[str, Any], Memory]:
        """(changes, memory): the first single change that fits, else the first changes together but for those that are
        not needed. Where even all do not fit, the changes with the least memory."""

        def fits(changes: Mapping[str, Any]) -> bool:
            return self.memory(changes, limit).total <= limit

        singles = list(self.changes())
        together: dict[str, Any] = {}
        found = next((dict(each) for each in singles if fits(each)), None)
        for each in singles if found is None else ():
            together |= each
            if fits(together):
                found = dict(together)
                break
        if found is None:
            return together, self.memory(together)
        for name in reversed(list(found)):
            fewer = {key: value for key, value in found.items() if key != name}
            if fewer and fits(fewer):
                found = fewer
        if "accumulation" in found:
            found = found | {"accumulation": self._least_accumulation(found, limit)}
        return found, self.memory(found, limit)

    def _least_accumulation(self, changes: Mapping[str, Any], limit: int) -> int:
        """The least number of micro-batches that fits; fewer rows never take more."""
        share = self.config.batch_size // self.processes
        counts = [k for k in range(self.config.accumulation + 1, share + 1) if share % k == 0]
        low, high = 0, len(counts) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self.memory({**changes, "accumulation": counts[middle]}, limit).total <= limit
            low, high = (low, middle) if fits else (middle + 1, high)
        return counts[low]


def _dtype(config: TrainConfig) -> Any:
    from .run import DTYPES

    return DTYPES[config.weights]
