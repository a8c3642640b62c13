"""A student that is compared with a moving average of itself, as consistency methods have it (Song et al. 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..denoiser import follow, held
from .base import Objective


class MovingTarget(Objective):
    """`target`: the student itself, or its average target <- d target + (1 - d) student, d = `config.target_ema`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        student = self.generator.denoiser
        self.target = held(student) if self.config.target_ema else student

    def kept(self) -> Sequence[nn.Module]:
        return list(self.state().values())

    def state(self) -> Mapping[str, nn.Module]:
        return {"target": self.target.network} if self.config.target_ema else {}

    def updated(self, player: str) -> None:
        if player == "generator" and self.config.target_ema:
            follow(self.target.network, self.generator.denoiser.network, self.config.target_ema)
