"""SIM: One-Step Diffusion Distillation through Score Implicit Matching (Luo et al. 2024, arXiv 2410.16794)."""

import math
from collections.abc import Callable

from torch import Tensor

from ..denoiser import Cond
from ..methods.sim import SIMConfig
from .base import Batch
from .score import Alternating


def pseudo_huber(y: Tensor, c: float) -> Tensor:
    """d'(y) of d(y) = (sqrt(|y|^2 + c^2) - c) / sqrt(D), the norm over all D elements of a sample; y has shape (B, D).

    Divided by sqrt(D) so that the loss does not grow with the picture.
    """
    return y / (y.square().sum(1, keepdim=True) + c**2).sqrt() / math.sqrt(y.shape[1])


def squared_l2(y: Tensor, c: float) -> Tensor:
    """d'(y) of d(y) = |y|^2 / D, the mean square; c plays no part."""
    return 2 * y / y.shape[1]


DISTANCES: dict[str, Callable[[Tensor, float], Tensor]] = {"pseudo-huber": pseudo_huber, "squared-l2": squared_l2}
"""The gradient d'(y) of each distance, by its name."""


class SIM(Alternating):
    """E d(fake - real) at the student's noised samples, for any distance d, with gradients through both denoisers."""

    Config = SIMConfig

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        x_t, t = self.noised(x, batch)
        fake, real = self.fake(x_t, t, cond), self.real(x_t, t, cond, uncond)
        c = self.config.huber_c or 0.00054 * math.sqrt(x[0].numel())
        loss = sim_loss(x, fake, real, lambda y: DISTANCES[self.config.distance](y, c))
        self.log["sim"] = loss.detach()
        return loss


def sim_loss(x: Tensor, fake: Tensor, real: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """mean over the batch of -d'(y)^T (fake - x) with y = fake - real and d' = `gradient`, on y of shape (B, D).

    x, fake, real have shape (B, ...) in x0 units; x_t and with it fake and real are functions of x. For an exact critic
    E[u(x_t)^T (fake(x_t) - x)] = 0 whatever u, also after a change of the generator and its critic. With u = d'(y)
    that makes the gradient of this loss, parameters frozen, the one of E d(y) with the law of x_t held still (the
    paper's score-gradient theorem). It passes through d'(y) as well: detached, it is another gradient.
    """
    y = (fake - real).flatten(1)
    return -(gradient(y) * (fake - x).flatten(1)).sum(1).mean()
