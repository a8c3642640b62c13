"""Segments of a trajectory: between which of its levels a student jumps, and a discriminator of where it lands."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser
from ..discriminator import ADVERSARIES, Discriminator
from ..rng import Rng
from ..second_time import KEY
from ..trajectory import Grid, Levels, jump
from .score import per_sample


def edge_below(level: Tensor, width: int) -> Tensor:
    """The lower edge of the segment of `level` >= 1, segments being `width` levels each; an edge is its segment's top.

    floor((n - 1) / width) width. Hyper-SD's own floor(n / width) width is n itself on an edge, where no jump is left.
    """
    return (level - 1) // width * width


def integers_up_to(rng: Rng, count: Tensor) -> Tensor:
    """Uniform integers in 0 .. count - 1, each item with a count of its own, shape (B,)."""
    return torch.minimum((rng.uniform() * count).long(), count - 1)


class Segments:
    """Jumps within the segments of a grid; `shown` is whether the network is told where they end."""

    def __init__(self, grid: Grid, shown: bool):
        self.grid, self.shown = grid, shown
        u = [0.0, *(grid.schedule.fraction(time) for time in grid.times[1:].tolist())]
        self.fractions = torch.tensor(u, device=grid.times.device)
        """Of the schedule, by level, shape (size + 1,): what the network is told."""

    def draw(self, rng: Rng, count: int, at_edges: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(level, end, ceiling) of a batch, each (B,), the grid being `count` segments.

        level ~ U{1 .. size}, end ~ U{edge .. level - 1}, or the edge below; ceiling is the edge above.
        """
        width = self.grid.size // count
        level = rng.integers(self.grid.size) + 1
        edge = edge_below(level, width)
        end = edge if at_edges else edge + integers_up_to(rng, level - edge)
        return level, end, edge + width

    def landed(self, denoiser: Denoiser, x: Tensor, level: Tensor, end: Tensor, cond: Cond) -> Tensor:
        """Psi(x, level -> end) = alpha_e x0_hat + sigma_e eps_hat, shape of x; x itself where level is end."""
        if self.shown:
            cond = cond | {KEY: self.fractions[end]}
        x_0 = denoiser(x, self.grid.time(level, x), cond)
        there = jump(x, x_0, self.grid.levels(level, x), self.grid.levels(end, x))
        return torch.where(per_sample(level == end, x), x.to(there.dtype), there)


class SegmentGAN:
    """A hinge GAN on landed samples, which are noised again to a random higher level of their segment.

    PCM (Wang et al. 2024, arXiv 2405.18407): at the level where it lands a sample may be anything from clean to
    next to pure noise; what is judged has a level that is uniform over (end, ceiling].
    """

    def __init__(self, grid: Grid, denoiser: Denoiser, head: Discriminator):
        """D = `head` on the features of `denoiser`."""
        self.grid, self.denoiser, self.head, self.adversary = grid, denoiser, head, ADVERSARIES["hinge"]

    def fool(self, x: Tensor, end: Tensor, ceiling: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The generator's loss -D, a mean over batch and heads."""
        return self._mean(self.adversary.fool, x, self._above(end, ceiling, rng), end, cond, rng)

    def tell(self, x: Tensor, target: Tensor, end: Tensor, ceiling: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The critic's loss, mean max(0, 1 + D(x)) + mean max(0, 1 - D(target)), both at the same levels."""
        above = self._above(end, ceiling, rng)
        fake = self._mean(self.adversary.fake, x, above, end, cond, rng)
        return fake + self._mean(self.adversary.real, target, above, end, cond, rng)

    def _above(self, end: Tensor, ceiling: Tensor, rng: Rng) -> Tensor:
        return end + 1 + integers_up_to(rng, ceiling - end)

    def _mean(self, loss: Callable[[Tensor], Tensor], x: Tensor, above: Tensor, end: Tensor, cond: Cond, rng: Rng) -> Tensor:
        here, there = self.grid.levels(end, x), self.grid.levels(above, x)
        x_t = renoised(x, here, there, rng.normal(x.shape[1:]).to(x.dtype))
        return loss(self.head(self.denoiser.features(x_t, self.grid.time(above, x), cond))).mean()


def renoised(x: Tensor, here: Levels, there: Levels, z: Tensor) -> Tensor:
    """A sample of level `here` at the noisier level `there`, shape of x; alpha of `here` is not 0.

    x_t = r x_e + sqrt(sigma_t^2 - r^2 sigma_e^2) z with r = alpha_t / alpha_e: of alpha_e x0 + sigma_e eps it makes
    alpha_t x0 + sigma_t eps' in law.
    """
    (alpha_e, sigma_e), (alpha_t, sigma_t) = here, there
    share = alpha_t / alpha_e
    return share * x + (sigma_t**2 - (share * sigma_e) ** 2).clamp_min(0).sqrt() * z
