"""The GAN critic: small convolutional heads on features of a denoiser, and the losses on them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .denoiser import Cond, Denoiser, stack
from .prediction import add_noise
from .rng import Rng


def as_map(feature: Tensor) -> Tensor:
    """A feature as (B, C, H, W): UNet maps unchanged, transformer tokens (B, N, C) laid out on their square grid."""
    if feature.ndim == 4:
        return feature
    side = math.isqrt(feature.shape[1])
    if side * side != feature.shape[1]:
        raise ValueError(f"{feature.shape[1]} tokens are no square grid; only square images can be discriminated")
    return feature.transpose(1, 2).unflatten(2, (side, side))


def head(channels: int, side: int) -> nn.Sequential:
    """4x4 convolutions of stride 2 down to at most 4x4, one over all that is left, one to the logit (DMD2, appendix)."""
    # a group of one channel would be normalised away where 1x1 is left: at least 4 a group
    groups = max((g for g in (1, 2, 4, 8, 16, 32) if channels % g == 0 and channels >= 4 * g), default=1)
    layers: list[nn.Module] = []
    while side > 4:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
        side //= 2
    layers += [nn.Conv2d(channels, channels, side), nn.GroupNorm(groups, channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.Flatten())


class Heads(nn.Module):
    """One head for each feature map; logits (B, heads), in float32."""

    def __init__(self, examples: Sequence[Tensor]):
        super().__init__()
        maps = [as_map(example) for example in examples]
        self.heads = nn.ModuleList(head(m.shape[1], m.shape[-1]) for m in maps)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(as_map(f).float()) for head, f in zip(self.heads, features)], dim=1)


class Discriminator(nn.Module):
    """Holds the heads as `network`, so that a distributed wrapper can take their place."""

    def __init__(self, examples: Sequence[Tensor]):
        super().__init__()
        self.network: nn.Module = Heads(examples)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.network(features)


@dataclass(frozen=True)
class Adversary:
    """The losses of a logit D, elementwise."""

    fool: Callable[[Tensor], Tensor]
    """The generator's, on its samples."""
    fake: Callable[[Tensor], Tensor]
    """The critic's, on the generator's samples."""
    real: Callable[[Tensor], Tensor]
    """The critic's, on real samples."""


ADVERSARIES = {
    # non-saturating: Goodfellow et al. 2014, section 3; the best D is log(p_real / p_fake)
    "softplus": Adversary(lambda d: F.softplus(-d), lambda d: F.softplus(d), lambda d: F.softplus(-d)),
    # Lim & Ye 2017; what lies beyond the margin of 1 teaches the critic nothing
    "hinge": Adversary(lambda d: -d, lambda d: F.relu(1 + d), lambda d: F.relu(1 - d)),
}


class GAN:
    """D(x_t) = heads on the features of `denoiser`; each sample has a noise level of its own."""

    def __init__(self, denoiser: Denoiser, head: Discriminator, t_max: float = 1.0, adversary: str = "softplus"):
        """`t_max` is the most noise, as a fraction of the schedule; `adversary` one of ADVERSARIES."""
        self.denoiser, self.head, self.t_max, self.adversary = denoiser, head, t_max, ADVERSARIES[adversary]

    def levels(self, rng: Rng) -> Tensor:
        """The noise levels as fractions of the schedule, shape (B,)."""
        return rng.uniform(0.0, self.t_max)

    def fool(self, x: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The generator's loss, mean over batch and heads; by default softplus(-D(x_t))."""
        return self.adversary.fool(self.head(self._features(x, cond, self.levels(rng), rng.normal(x.shape[1:])))).mean()

    def tell(self, x: Tensor, real: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The critic's loss from one pass over both halves; by default mean softplus(D(x_t)) + mean softplus(-D(real_t))."""
        return self.told(self.head(self.both(x, real, cond, rng)))

    def both(self, x: Tensor, real: Tensor, cond: Cond, rng: Rng) -> list[Tensor]:
        """Features of x_t and of real_t, one after the other in the batch."""
        u = torch.cat([self.levels(rng), self.levels(rng)])
        noise = torch.cat([rng.normal(x.shape[1:]), rng.normal(x.shape[1:])])
        return self._features(torch.cat([x, real]), stack(cond, cond), u, noise)

    def tell_by(self, features: Sequence[Tensor], real: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """`tell` where the features of x_t are known: the pass is over the real samples alone."""
        known = self._features(real, cond, self.levels(rng), rng.normal(real.shape[1:]))
        return self.told(self.head([torch.cat(each) for each in zip(features, known)]))

    def told(self, logits: Tensor) -> Tensor:
        """The critic's loss from the logits of both halves."""
        by_x, by_real = logits.chunk(2)
        return self.adversary.fake(by_x).mean() + self.adversary.real(by_real).mean()

    def _features(self, x: Tensor, cond: Cond, u: Tensor, noise: Tensor) -> list[Tensor]:
        schedule = self.denoiser.schedule
        t = schedule.at(u)
        return self.denoiser.features(add_noise(schedule, x, noise, t), t, cond)


def heads_on(denoiser: Denoiser, shape: Sequence[int], t: Tensor, cond: Cond) -> Discriminator:
    """Fresh heads for the features of a denoiser; `shape` is that of one x0, `t` and `cond` any batch of one."""
    with torch.no_grad():
        features = denoiser.features(torch.zeros(1, *shape, device=t.device), t, cond)
    return Discriminator(features).to(t.device)
