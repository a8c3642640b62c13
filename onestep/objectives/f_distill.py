"""f-distill: One-step Diffusion Models with f-Divergence Distribution Matching (Xu et al. 2025, arXiv 2502.15681)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import option
from ..denoiser import Cond, unwrap
from ..discriminator import Discriminator
from ..prediction import add_noise
from .base import Batch
from .dmd2 import DMD2, DMD2Config
from .score import matching_loss, per_sample, per_sample_weight

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "forward-kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "squared-hellinger": torch.sqrt,
    "neyman": lambda r: 1 / r,
    "jeffreys": lambda r: 1 + r,
}
"""h(r) = f''(r) r^2 of the divergence E_p f(q / p), r = q / p, up to a factor that the division by h's mean takes out."""

LEAST, MOST = 0.1, 20.0
"""Limits of r."""
BINS = 10


@dataclass
class FDistillConfig(DMD2Config):
    """Options of f-distill: those of DMD2, whose GAN it needs, and the divergence."""

    divergence: str = option("js", "f-divergence that is minimised", choices=tuple(WEIGHTS))
    density_decay: float = option(
        0.95, "decay of the moving means that the density ratio is divided by", minimum=0.0, below=1.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gan_critic:
            raise ValueError(
                "f-distill takes the density ratio from the discriminator, and gan_critic 0 does not train one; "
                "type for example --gan-critic 0.01, or --method dmd2 for the reverse KL without a GAN"
            )
        if self.gan_t_max < self.t_max:
            raise ValueError(
                f"gan_t_max {self.gan_t_max} is below t_max {self.t_max}: the density ratio would be read where the "
                f"discriminator learns nothing; type --gan-t-max {self.t_max} or more, or --t-max {self.gan_t_max}"
            )


class FDistill(DMD2):
    """DMD2 with the matching gradient of each sample times h(r), r = p_real(x_t) / p_fake(x_t) = exp(logit)."""

    Config = FDistillConfig

    def _discriminator(self) -> Discriminator:
        head = super()._discriminator()
        head.network = HeadsAndMeans(head.network, self.config.density_decay).to(self.teacher.device)
        return head

    def match(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        with torch.no_grad():
            u = batch.rng.uniform(self.config.t_min, self.config.t_max)
            t = self.schedule.at(u)
            x_t = add_noise(self.schedule, x, batch.rng.normal(x.shape[1:]), t)
            fake, features = self.fake.with_features(x_t, t, cond)
            real = self.real(x_t, t, cond, uncond)
            h = per_sample(self._weight(features, u).to(x_t.dtype), x)
        loss = matching_loss(x, fake, real, h * per_sample_weight(x.detach(), real))
        self.log["matching"] = loss.detach()
        return loss

    def _weight(self, features: Sequence[Tensor], u: Tensor) -> Tensor:
        """h(r) over its mean on all processes, for the features of x_t at the fractions u of the schedule; shape (B,)."""
        assert self.gan is not None
        heads = unwrap(self.gan.head.network)
        assert isinstance(heads, HeadsAndMeans)
        logit = self.gan.head(features).mean(1)
        r = logit.to(torch.promote_types(logit.dtype, torch.float32)).exp().clamp(LEAST, MOST)
        h = WEIGHTS[self.config.divergence](r / heads.mean(r, u))
        total, count = summed(torch.stack([h.sum(), torch.ones_like(h).sum()])).unbind()
        return h * count / total


class HeadsAndMeans(nn.Module):
    """The discriminator's heads, and moving means of r in ten bins of the noise level: r is 1 on average over the student.

    The means are a buffer of a player's network. So checkpoints hold them, and a run that is resumed goes on exactly.
    """

    sums: Tensor
    """Discounted sums of r, and of ones, in each bin; shape (2, BINS)."""

    def __init__(self, heads: nn.Module, decay: float):
        super().__init__()
        self.heads, self.decay = heads, decay
        self.register_buffer("sums", torch.zeros(2, BINS))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.heads(features)

    def mean(self, r: Tensor, u: Tensor) -> Tensor:
        """Take in r at the fractions u of the schedule, both (B,); returns the mean of each one's bin, shape (B,)."""
        bins = (u * BINS).long().clamp_max(BINS - 1)
        member = (bins[:, None] == torch.arange(BINS, device=u.device)).to(r.dtype)
        new = summed(torch.stack([(r[:, None] * member).sum(0), member.sum(0)]))
        self.sums.mul_(self.decay).add_(new.to(self.sums.dtype))
        total, count = self.sums.to(r.dtype)
        return total[bins] / count[bins]


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, put into `values`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
