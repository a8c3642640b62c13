"""BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping (Gu et al. 2023, arXiv 2306.05544)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Call, Cond, Denoiser, stack, unwrap
from ..generator import Generator
from ..lora import Adapter
from ..methods.boot import BOOTConfig
from ..second_time import KEY, add_second_time, layers, timed
from ..trajectory import Grid, heun, ratio
from .base import Batch, Objective

SPAN = 0.5
"""Part of the schedule that stands for the way to x0 where the network's own time is all that it can be told."""
COARSE = (4, 2)
"""How many times delta is larger in the first and in the second half of `anneal`."""

WEIGHTS: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "slope": lambda kept, levels, most: ((1 - kept) ** -2).clamp_max(most),
    "uniform": lambda kept, levels, most: torch.full_like(kept, levels**2),
}
"""omega_t / delta^2 from q_s / q_t and 1 / delta: omega = 1 / lambda'^2, or 1. The first is the squared error of the x0 that
a step implies, up to a largest weight; the second is the paper's."""


class BOOT(Objective):
    """y(eps, t), the clean signal at time t of the teacher's trajectory from eps, taught from t on down to 0.

    With x_t = alpha_t y_t + sigma_t eps the probability-flow ODE is dy/dlambda = f(x_t, t) - y, lambda = ln(alpha/sigma), f
    the teacher's x0 (eq. 9). The student is asked for its own y_t, the teacher for f there, and y_s is regressed on the
    step from them, s the next level below t. No data are used. `signal` says how a network is told t.
    """

    Config = BOOTConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if len(self.generator.times) > 1:
            raise ValueError("boot makes one-step students, for a later step has no eps to go on; type --student-steps 1")
        self.schedule = self.generator.denoiser.schedule
        self.grids = {factor: self._grid(max(1, self.config.levels // factor)) for factor in (*COARSE, 1)}

    def _grid(self, size: int) -> Grid:
        return Grid(self.schedule, size, self.generator.times[0], self.teacher.device)

    @classmethod
    def prepare(cls, config: Any, generator: Generator) -> None:
        """Give the network the time t beside its own, except for an adapter, whose base is the teacher too."""
        denoiser = generator.denoiser
        if not isinstance(denoiser.network, Adapter):
            add_second_time(denoiser.network)
            denoiser.call = timed(denoiser.call)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        cond, uncond = self.teacher.encode(batch.conditions)
        z = batch.rng.normal(self.teacher.shape)
        grid = self.grid(step)
        here = 1 + batch.rng.integers(grid.size)
        only = step < self.config.boundary_steps
        with torch.no_grad():  # before the student's pass with a gradient, between which and its backward none may come
            target, edge = self.targets(grid, z, here, cond, uncond, only)
        u, top = (here - 1) / grid.size, torch.ones(len(z), device=z.device)
        if only:
            y_top = self.signal(z, top, cond)
        else:
            y_s, y_top = self.signal(torch.cat([z, z]), torch.cat([u, top]), stack(cond, cond)).chunk(2)
        boundary = (y_top - edge).square().mean()
        loss = self.config.boundary * boundary
        self.log["boundary"] = boundary.detach()
        if not only:
            signal = (self.weights(grid, here, y_s) * (y_s - target).square()).mean()
            loss = loss + signal
            self.log["signal"] = signal.detach()
        yield "generator", loss

    def grid(self, step: int) -> Grid:
        """The levels in force: delta is halved in the middle and at the end of `anneal`."""
        anneal = self.config.anneal
        return self.grids[1 if step >= anneal else COARSE[2 * step // anneal]]

    def targets(
        self, grid: Grid, z: Tensor, here: Tensor, cond: Cond, uncond: Cond | None, only: bool
    ) -> tuple[Tensor, Tensor]:
        """(y_hat_s, f(eps, T)): targets of the signal one level below `here` and of the boundary; the first if not `only`.

        y_hat_s = q_s/q_t y_t + (1 - q_s/q_t) f, which is exact where f is constant, or the signal after Heun's step of x_t.
        """
        start, top = self.generator.input_scale * z, self.generator.time(0, z)
        if only:
            return z, self.teacher(start, top, cond, uncond, self.guidance)
        levels, below = grid.levels(here, z), grid.levels(here - 1, z)
        y = self.signal(z, here / grid.size, cond)
        x_t = levels[0] * y + levels[1] * z
        x, t = torch.cat([x_t, start]), torch.cat([grid.time(here, z), top])
        f, edge = self.teacher(x, t, stack(cond, cond), uncond and stack(uncond, uncond), self.guidance).chunk(2)
        if self.config.solver == "ddim":
            kept = ratio(levels, below)
            return kept * y + (1 - kept) * f, edge
        below_t = grid.time(here - 1, z)
        x_s = heun(x_t, f, levels, below, lambda x: self.teacher(x, below_t, cond, uncond, self.guidance))
        return (x_s - below[1] * z) / below[0], edge

    def signal(self, z: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """y(eps, t) at the fraction u of the way up, shape (B,): the denoiser's x0 at (eps, T), told u as its second time.

        At u = 0 that is the generator itself. An adapter is told u by the network's own time, at 1 - u/2 of the schedule,
        while x0 is still read as at T, so that u = 0 is again what the stock pipeline asks for.
        """
        denoiser, x, top = self.generator.denoiser, self.generator.input_scale * z, self.generator.time(0, z)
        if layers(unwrap(denoiser.network)):
            return denoiser(x, top, cond | {KEY: u})
        told = self.schedule.timestep(self.schedule.at(self.schedule.fraction(self.generator.times[0]) * (1 - SPAN * u)))
        call: Call = lambda network, x, timestep, cond: denoiser.call(network, x, told, cond)  # noqa: E731
        return Denoiser(denoiser.network, denoiser.schedule, denoiser.prediction, call)(x, top, cond)

    def weights(self, grid: Grid, here: Tensor, like: Tensor) -> Tensor:
        """omega_t / delta^2, shape (B, 1, ...)."""
        kept = ratio(grid.levels(here, like), grid.levels(here - 1, like))
        return WEIGHTS[self.config.weight](kept, grid.size, self.config.most)
