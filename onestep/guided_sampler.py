"""Sampling with guidance in one pass a step: many steps, and the guidance as an input."""

import torch
from torch import Tensor

from .denoiser import Cond, Denoiser
from .generator import Generator
from .guided import KEY
from .trajectory import Grid, ddim


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
        return ddim(lambda x, t: self.denoiser(x, t, given), grid, z)
