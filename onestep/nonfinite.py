"""NaN and infinity: noticed on the device without waiting for it, stopped with a name, or skipped and counted."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .config import TrainConfig
from .log import keep_rows

SKIPPED = "skipped.jsonl"
"""In a run's folder: one row for each update that was skipped."""
NEVER = 2**62
ADVICE = "the last checkpoint is still good: train again with a smaller --lr in a new --output, or with --mixed-precision no"


class NonFinite(FloatingPointError):
    """Numbers of an update are not finite. `step` is the number of updates done before it; `player` None: not known."""

    def __init__(self, what: str, step: int, player: str | None = None, then: str = ADVICE):
        super().__init__(f"{what} in step {step + 1}; {then}")
        self.what, self.step, self.player = what, step, player


class Watch:
    """The first update whose loss or gradient norm is not finite, kept on the device: `require` alone waits for it.

    Losses and norms are plain tensors of any shape. All processes call all methods alike, and stop together; `main` is the
    one of them that writes and tells.
    """

    def __init__(self, players: Sequence[str], device: torch.device | str, main: bool = True):
        self.players, self.main = list(players), main
        self._first = torch.full((), NEVER, dtype=torch.long, device=device)

    def resumed(self, step: int) -> None:
        """The run goes on after `step` updates."""

    def loss(self, step: int, player: str, loss: Tensor) -> None:
        """See the loss of a micro-batch."""
        self._note(step, player, loss)

    def allows(self, step: int, player: str, norm: Tensor) -> bool:
        """See the gradient norm of an update; whether the update may be made."""
        self._note(step, player, norm)
        return True

    def _note(self, step: int, player: str, number: Tensor) -> None:
        code = step * len(self.players) + self.players.index(player)
        bad = ~number.detach().isfinite().all()
        self._first = torch.where(bad, self._first.clamp(max=code), self._first)

    def require(self) -> None:
        """Raises NonFinite, in all processes, where any of them has seen a number that is not finite."""
        code = int(least(self._first))
        if code != NEVER:
            step, index = divmod(code, len(self.players))
            player = self.players[index]
            raise NonFinite(f"the loss or the gradient of the {player} is not finite", step, player)

    def logged(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The scalars of an update, to be logged. Raises NonFinite for one that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFinite(f"the {name} loss is {value}", step)
        return dict(values)


class SkippingWatch(Watch):
    """Leaves out updates with a loss or gradient that is not finite, up to `limit` of them in a run; each one is told.

    It waits for the device at every update. The count goes on where a run is resumed: it is that of the rows in
    `folder`/skipped.jsonl.
    """

    def __init__(self, players: Sequence[str], device: torch.device | str, main: bool, folder: Path, limit: int):
        super().__init__(players, device, main)
        self.path, self.limit = folder / SKIPPED, limit
        self.steps: list[int] = []
        self._losses: list[Tensor] = []

    def resumed(self, step: int) -> None:
        if self.path.exists():
            if self.main:
                keep_rows(self.path, step)
            rows = (json.loads(line)["step"] for line in self.path.read_text().splitlines())
            self.steps = [row - 1 for row in rows if row <= step]

    def loss(self, step: int, player: str, loss: Tensor) -> None:
        self._losses.append(loss.detach().isfinite().all())

    def allows(self, step: int, player: str, norm: Tensor) -> bool:
        finite = torch.stack([norm.detach().isfinite().all(), *self._losses]).all()
        self._losses.clear()
        if int(least(finite.long())):
            return True
        self.steps.append(step)
        if len(self.steps) > self.limit:
            raise NonFinite(
                f"the loss or the gradient of the {player} is not finite, after {self.limit} skipped updates,", step, player
            )
        if self.main:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step + 1, "player": player}) + "\n")
            told = f"warning: step {step + 1}: the loss or the gradient of the {player} is not finite; its update is skipped"
            tqdm.write(f"{told} ({len(self.steps)} of at most {self.limit})", file=sys.stderr)
        return False

    def logged(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        if not self.steps:
            return super().logged(step, values)
        # a loss that was not finite stays in the log until its player's next turn
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return finite | {"skipped": float(len(self.steps))}


def watch_of(config: TrainConfig, players: Sequence[str], device: torch.device | str, main: bool) -> Watch:
    """The watch that --skip-nonfinite asks for."""
    if config.skip_nonfinite:
        return SkippingWatch(players, device, main, config.folder, config.skip_nonfinite)
    return Watch(players, device, main)


def least(number: Tensor) -> Tensor:
    """The smallest of all processes' numbers."""
    if dist.is_available() and dist.is_initialized():
        number = number.clone()
        dist.all_reduce(number, dist.ReduceOp.MIN)
    return number
