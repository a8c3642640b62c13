"""VSD: variational score distillation (ProlificDreamer, Wang et al. 2023, arXiv 2305.16213), for a one-step generator.

Without the 3D scene and its views: the generator takes the place of the rendering, and the critic that of the LoRA.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..denoiser import Cond, frozen
from ..methods.vsd import VSDConfig
from .base import Batch
from .score import ScoreDistillation, matching_loss


class VSD(ScoreDistillation):
    """dL/dx = w(t) (eps_teacher(x_t) - eps_critic(x_t)), guidance on the teacher alone.

    The order is SwiftBrush's: the generator on one x, then the critic on an x from fresh noise, made after that update.
    """

    Config = VSDConfig

    def updates(self, batch: Batch, step: int, cond: Cond, uncond: Cond | None) -> Iterator[tuple[str, Tensor]]:
        if step % self.config.ratio == 0:
            x = self.sample(batch, cond, grad=True)
            with frozen(*self.players()["critic"]):  # spans the caller's backward
                yield "generator", self.generator_loss(x, batch, cond, uncond)
        yield "critic", self.denoising(self.sample(batch, cond), batch, cond)

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        with torch.no_grad():
            x_t, t = self.noised(x, batch)
            fake, real = self.compared(x_t, t, batch, cond, uncond)
        loss = matching_loss(x, fake, real, x0_weight(*self.schedule(t, x)))
        self.log["matching"] = loss.detach()
        return loss

    def compared(self, x_t: Tensor, t: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> tuple[Tensor, Tensor]:
        """(fake, real) x0 at x_t, whose difference moves the generator."""
        return self.fake(x_t, t, cond), self.real(x_t, t, cond, uncond)


def noise_weight(alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """w(t) = sigma^2 / (alpha^2 + sigma^2): the paper's sigma^2 where alpha^2 + sigma^2 = 1.

    A function of sigma / alpha, as the noise estimate is: the same teacher read as VP or as EDM gets the same gradient.
    """
    return sigma_t**2 / (alpha_t**2 + sigma_t**2)


def x0_weight(alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """w(t) alpha / sigma: the weight of x0_critic - x0_teacher that is w(t) on eps_teacher - eps_critic.

    As eps = (x_t - alpha x0) / sigma, the difference changes its sign, and gains alpha / sigma.
    """
    return alpha_t * sigma_t / (alpha_t**2 + sigma_t**2)
