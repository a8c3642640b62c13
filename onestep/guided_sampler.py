"""Sampling with guidance in one pass a step: many steps, and the guidance as an input."""

import torch
from torch import Tensor

from .denoiser import Cond, Denoiser
from .generator import Generator
from .guided import KEY
from .trajectory import Grid, jump


class GuidedSampler(Generator):
    """x0 by DDIM through `times`, one pass a step, at `guidance`; shape of z. Later noises are not needed.

    The denoiser's network is a `onestep.guided.Guided`; guidance 1 runs it without its adapters.
    """

    def __init__(self, denoiser: Denoiser, steps: int, guidance: float):
        super().__init__(denoiser, denoiser.schedule.grid(steps))
        self.guidance = guidance

    @property
    def draws(self) -> int:
        return 1

    def around(self, denoiser: Denoiser) -> "GuidedSampler":
        return GuidedSampler(denoiser, len(self.times), self.guidance)

    def forward(self, z: Tensor, cond: Cond, noises: object = ()) -> Tensor:
        grid = Grid(self.denoiser.schedule, len(self.times), device=z.device)
        given = cond if self.guidance == 1 else cond | {KEY: torch.full((1,), self.guidance, device=z.device)}
        x = self.denoiser.schedule.init_sigma * z
        for number in range(grid.size, 0, -1):
            level = torch.full((len(z),), number, device=z.device)
            x_0 = self.denoiser(x, grid.time(level, x), given)
            x = jump(x, x_0, grid.levels(level, x), grid.levels(level - 1, x))
        return x
