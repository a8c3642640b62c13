"""DMD: One-step Diffusion with Distribution Matching Distillation (Yin et al. 2023, arXiv 2311.18828)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import option
from ..denoiser import Cond
from .base import Batch
from .regression import Regression, RegressionConfig
from .score import ScoreConfig, ScoreDistillation, matching_loss, per_sample_weight


@dataclass
class DMDConfig(RegressionConfig, ScoreConfig):
    """Options of DMD: those of the score methods, those of the regression, and the weight between them."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    regression: float = option(0.25, "weight of the regression on teacher pairs; 0 makes no pairs", minimum=0.0)


class DMD(ScoreDistillation):
    """Distribution matching, held together by a regression on pairs of noise and teacher sample.

    Generator and critic take turns one to one, on the same samples. Losses are means over batch and elements.
    """

    Config = DMDConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.regression = Regression(*args, **kwargs) if self.config.regression else None

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        loss = self._match(x, batch, cond, uncond)
        if self.regression is not None:
            _, distance = next(self.regression.step(batch, 0))
            self.log["regression"] = distance.detach()
            loss = loss + self.config.regression * distance
        return loss

    def _match(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        """The loss with gradient w_t alpha_t (s_fake - s_real) / numel in x, w_t = sigma_t^2 / (alpha_t mean|x - real|).

        These are eqs. 7 and 8. With s_fake - s_real = alpha_t / sigma_t^2 (fake - real) the gradient is
        alpha_t (fake - real) / mean|x - real| / numel.
        """
        with torch.no_grad():
            x_t, t = self.noised(x, batch)
            fake, real = self.fake(x_t, t, cond), self.real(x_t, t, cond, uncond)
            alpha_t, _ = self.schedule(t, x)
        loss = matching_loss(x, fake, real, alpha_t * per_sample_weight(x.detach(), real))
        self.log["matching"] = loss.detach()
        return loss
