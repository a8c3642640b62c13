"""DMD: One-step Diffusion with Distribution Matching Distillation (Yin et al. 2023, arXiv 2311.18828)."""

from typing import Any

from torch import Tensor

from ..denoiser import Cond
from ..methods.dmd import DMDConfig
from .base import Batch
from .regression import Regression
from .score import ScoreDistillation


class DMD(ScoreDistillation):
    """Distribution matching, held together by a regression on pairs of noise and teacher sample.

    Generator and critic take turns one to one, on the same samples. Losses are means over batch and elements.
    """

    Config = DMDConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.regression = Regression(*args, **kwargs) if self.config.regression else None

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        loss = self.match(x, batch, cond, uncond)
        if self.regression is not None:
            _, distance = next(self.regression.step(batch, 0))
            self.log["regression"] = distance.detach()
            loss = loss + self.config.regression * distance
        return loss
