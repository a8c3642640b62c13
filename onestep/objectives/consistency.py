"""What consistency methods share: one network at two levels of a teacher's trajectory (Song et al. 2023)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond, guided
from ..prediction import Epsilon
from ..rng import Rng
from ..trajectory import Grid
from .base import Batch
from .regression import l2, pseudo_huber
from .target import MovingTarget


class Consistency(MovingTarget):
    """f(x_t, t) is to be what it is at x_s, where the teacher leads x_t: mean weight d(f(x_t, t), f'(x_s, s)).

    x_t is a real sample, noised to a level drawn evenly from the grid; f' is the student, or a moving average of it. f is
    the denoiser's x0, and x itself at level 0. A method says how the teacher leads: `lead`. Passes of a step: 1 of the
    student, 1 of f' without gradient, and those of `lead`.
    """

    parts, gap = 1, 1
    """Levels of `grid` that make one of the student's, and the student's levels between x_t and x_s."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, times, live = self.config, self.generator.times, self.generator.denoiser
        grid = Grid(live.schedule, c.levels, times[0], self.teacher.device, through=times)
        auto = "signal" if isinstance(live.prediction, Epsilon) else "uniform"
        kind, power = auto if c.weight == "auto" else c.weight, 2 if c.distance == "l2" else 1
        self.weights = level_weights(grid, kind, self.gap, power)
        self.grid = grid if self.parts == 1 else grid.finer(self.parts)

    @classmethod
    def uses_real(cls, config: Any) -> bool:
        return True

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        cond, uncond = self.teacher.encode(batch.conditions)
        yield "generator", self.compared(batch, cond, uncond)[1]

    def compared(self, batch: Batch, cond: Cond, uncond: Cond | None) -> tuple[Tensor, Tensor]:
        """(f(x_t, t), loss): the student's samples, shape (B, ...), with their gradient, and what they are to minimise."""
        if batch.real is None:
            raise ValueError("trajectories start from real samples: type --data with pictures, such as --data FOLDER")
        x_0, rng = batch.real, batch.rng
        level = 1 + rng.integers(len(self.weights))
        here, there = self.parts * level, self.parts * (level - self.gap).clamp_min(0)
        x_t = self.grid.noised(x_0, rng.normal(x_0.shape[1:]).to(x_0.dtype), here)
        guidance = self.guide(x_t, rng)
        known = cond | self.told(guidance)
        with torch.no_grad():  # before the student's pass, for no other may come between it and its backward
            x_s = self.lead(x_t, here, there, cond, uncond, guidance, rng)
            target = self.grid.consistency(self.target, x_s, there, known)
        x = self.grid.consistency(self.generator.denoiser, x_t, here, known)
        loss = (self.weights[level - 1].to(x.dtype) * self._distances(x, target)).mean()
        self.log["consistency"] = loss.detach()
        return x, loss

    def lead(
        self, x_t: Tensor, here: Tensor, there: Tensor, cond: Cond, uncond: Cond | None, guidance: Any, rng: Rng
    ) -> Tensor:
        """x_s of the level `there` below `here`, by the teacher; without gradient."""
        raise NotImplementedError

    def guide(self, like: Tensor, rng: Rng) -> Tensor | float:
        """The teacher's guidance: one for all, or each sample's own, shape (B, 1, ...)."""
        return self.guidance

    def told(self, guidance: Tensor | float) -> Cond:
        """What the student is told of the guidance."""
        return {}

    def real(self, x_t: Tensor, level: Tensor, cond: Cond, uncond: Cond | None, guidance: Tensor | float) -> Tensor:
        """x0 of the teacher under guidance, at levels of the grid."""
        t = self.grid.time(level, x_t)
        if isinstance(guidance, Tensor):
            return guided(self.teacher.denoiser, x_t, t, cond, uncond, guidance)
        return self.teacher(x_t, t, cond, uncond, guidance)

    def _distances(self, x: Tensor, target: Tensor) -> Tensor:
        """Each sample's distance, shape (B,): their mean is that of `onestep.objectives.regression`."""
        c = self.config.huber or 0.00054 * math.sqrt(x[0].numel())
        kind = l2 if self.config.distance == "l2" else partial(pseudo_huber, c=c)
        return torch.vmap(lambda a, b: kind(a[None], b[None]))(x, target)


def level_weights(grid: Grid, kind: str, gap: int, power: int = 1) -> Tensor:
    """Weights of the levels 1 .. size, shape (size,), with mean 1.

    uniform: 1 (Song et al. 2023). signal: (alpha / sqrt(alpha^2 + sigma^2))^power for a distance that grows with that
    power of a difference: x0 of an epsilon network has its error times sigma / alpha, and this takes it back. gap:
    1 / (q_t - q_s) with q = sigma / alpha (Song & Dhariwal 2023, arXiv 2310.14189). Raises ValueError where one is 0.
    """
    if kind == "uniform":
        return torch.ones_like(grid.alpha[1:])
    level = torch.arange(1, grid.size + 1, device=grid.alpha.device)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((grid.alpha[n], grid.sigma[n]) for n in (level, (level - gap).clamp_min(0)))
    if kind == "signal":
        weights = (alpha_t / (alpha_t**2 + sigma_t**2).sqrt()) ** power
    else:
        weights = alpha_t * alpha_s / (sigma_t * alpha_s - sigma_s * alpha_t)
    if bool((weights <= 0).any()):
        raise ValueError(f"the noisiest level has no signal, and --weight {kind} would leave it out; type --weight uniform")
    return weights / weights.mean()
