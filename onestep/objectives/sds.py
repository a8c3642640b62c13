"""SDS and ASD, score distillation without a critic: to compare with. Neither matches distributions.

SDS: DreamFusion (Poole et al. 2022, arXiv 2209.14988). ASD: ScaleDreamer (Ma et al. 2024, arXiv 2407.02040).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..methods.sds import ASDConfig, SDSConfig
from ..prediction import add_noise
from .base import Batch, Objective
from .score import matching_loss
from .vsd import noise_weight


class SDS(Objective):
    """dL/dx = w(t) (eps_teacher(x_t) - eps), w as in VSD (DreamFusion, eq. 3).

    On Gaussians its gradient in the generator's deviation s is w k s, k > 0: the samples collapse to the mode.
    """

    Config = SDSConfig

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        cond, uncond = self.teacher.encode(batch.conditions)
        x = self.generator.simulate(self.teacher.shape, cond, batch.rng, grad=True)
        loss = self.generator_loss(x, batch, cond, uncond)
        self.log["matching"] = loss.detach()
        yield "generator", loss

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        u, eps = batch.rng.uniform(self.config.t_min, self.config.t_max), batch.rng.normal(x.shape[1:])
        error, weight = self.error(x, eps, u, cond, uncond, self.guidance)
        return matching_loss(x, error, torch.zeros_like(x), weight)

    @torch.no_grad()
    def error(
        self, x: Tensor, eps: Tensor, u: Tensor, cond: Cond, uncond: Cond | None, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """(eps_teacher(x_t) - eps, w(t)) at fraction u of the schedule, from x0: (alpha / sigma) (x - x0_teacher(x_t))."""
        schedule = self.teacher.denoiser.schedule
        t = schedule.at(u)
        alpha_t, sigma_t = schedule(t, x)
        x_0 = self.teacher(add_noise(schedule, x, eps, t), t, cond, uncond, guidance)
        return alpha_t / sigma_t * (x - x_0), noise_weight(alpha_t, sigma_t)


class ASD(SDS):
    """dL/dx = w(t) (eps_teacher(x_t) - eps_teacher(x_t')), t' = t + Delta, with one eps and no guidance at t'.

    Delta = shift (t - t_min) U(0, 1). With k(t) = sigma alpha / v its gradient on Gaussians is SDS's with k(t) - k(t')
    in the place of k(t): where sigma / alpha is above the data's deviation it shrinks the samples, below it pushes them
    away from the teacher's mean. Matching distributions is no fixed point of the sum but by chance.
    """

    Config = ASDConfig

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        c, rng = self.config, batch.rng
        u, eps = rng.uniform(c.t_min, c.t_max), rng.normal(x.shape[1:])
        above = (u + c.shift * (u - c.t_min) * rng.uniform()).clamp(max=1)
        error, weight = self.error(x, eps, u, cond, uncond, self.guidance)
        error_above, _ = self.error(x, eps, above, cond, None, 1.0)
        return matching_loss(x, error, error_above, weight)
