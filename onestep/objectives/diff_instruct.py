"""Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models (Luo et al. 2023).

arXiv 2305.18455.
"""

from typing import Any

from torch import Tensor

from ..denoiser import Cond
from ..methods.diff_instruct import DiffInstructConfig
from ..prediction import add_noise
from ..schedule import LogNormal
from .base import Batch
from .score import Alternating, matching_loss


class DiffInstruct(Alternating):
    """The integral of KL divergences over noise levels, with weight 1 in x0 units and no normaliser."""

    Config = DiffInstructConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c = self.config
        log_normal = c.noise == "log-normal"
        self.law = LogNormal(self.schedule, c.noise_mean, c.noise_std, self.teacher.device) if log_normal else None

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        """The loss with gradient (fake - real) / numel in x: sigma_t^2 / alpha_t^2 times that of KL(p_t || q_t)."""
        fake, real = self.estimates(x, batch, cond, uncond)
        loss = matching_loss(x, fake, real, 1.0)
        self.log["matching"] = loss.detach()
        return loss

    def noised(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.law is None:
            return super().noised(x, batch)
        t = self.schedule.at(self.law(batch.rng).clamp(self.config.t_min, self.config.t_max))
        return add_noise(self.schedule, x, batch.rng.normal(x.shape[1:]), t), t

    def denoising(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor:
        t = None if self.law is None else self.schedule.at(self.law(batch.rng))
        loss = self.fake.loss(x, cond, batch.rng, t)
        self.log["denoising"] = loss.detach()
        return loss
