"""SiD: Score identity Distillation (Zhou et al. 2024, arXiv 2404.04057)."""

from torch import Tensor

from ..denoiser import Cond
from ..methods.sid import SiDConfig
from .base import Batch
from .score import Alternating, per_sample_weight

MOST = 1e5
"""The largest weight of a sample: the paper's code divides by 1e-5 at least."""


class SiD(Alternating):
    """The Fisher divergence of noised student and teacher, with gradients through the inputs of both denoisers."""

    Config = SiDConfig

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        x_t, t = self.noised(x, batch)
        fake, real = self.fake(x_t, t, cond), self.real(x_t, t, cond, uncond)
        weight = per_sample_weight(x.detach(), real.detach()).clamp_max(MOST)
        loss = sid_loss(x, fake, real, self.config.alpha, weight)
        self.log["sid"] = loss.detach()
        return loss


def sid_loss(x: Tensor, fake: Tensor, real: Tensor, alpha: float, weight: Tensor | float) -> Tensor:
    """mean weight * y (real - x - alpha y) with y = real - fake, over batch and elements.

    x, fake, real have shape (B, ...) in x0 units, `weight` broadcasts against them; x_t and with it fake and real are
    functions of x, and gradients pass through all three. With weight 1, an exact critic and frozen parameters, the
    expected gradient is for alpha = 1/2 that of 1/2 E|y|^2, and for alpha = 1 the same with the law of x_t held still.
    """
    y = real - fake
    return (weight * y * (real - x - alpha * y)).mean()
