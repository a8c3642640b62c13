"""The noise and conditions that a run is drawn and judged by, and the teacher's samples of them: the same at every step."""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import TrainConfig
from .denoiser import Cond
from .generator import Generator
from .rng import Rng
from .teacher import Teacher

CONDITIONS = 10
"""Most conditions in a panel."""
SAMPLES = 32
"""Samples that a check of health takes at least, where training is long enough beside it."""


def rows_in(cond: Cond, rows: slice) -> Cond:
    """Some rows of a batch of conditions."""
    return {name: value[rows] for name, value in cond.items()}


def health_every(config: TrainConfig) -> int:
    """Steps between checks of health; 0 is off."""
    return config.grid_every if config.health_every is None else config.health_every


def health_samples(config: TrainConfig, conditions: int) -> int:
    """Samples of each condition in a check of health: as many as the grid has, and SAMPLES in all, but at least two.

    A check takes about four passes a sample, and a step of training at least as many for a row of its batch: with one
    sample for a hundred rows trained between two checks, they take a hundredth of the passes.
    """
    every = health_every(config)
    if every == 0:
        return 0
    wanted = max(config.grid_columns, -(-SAMPLES // conditions))
    return max(2, min(wanted, every * config.batch_size // (100 * conditions)))


class Panel:
    """Up to ten conditions, `each` samples of every one, in order: noise, conditions, the teacher's x0.

    z, x_0: (conditions * each, *shape of x0); `noises` are the later draws of a chain, and `eps` is one more.
    """

    @torch.no_grad()
    def __init__(self, config: TrainConfig, teacher: Teacher, generator: Generator, guidance: float, rows: int):
        """`guidance` is the teacher's; only `rows` are computed at once, as many as training has in memory anyway."""
        self.teacher, self.guidance, self.rows = teacher, guidance, rows
        self.conditions = min(CONDITIONS, teacher.classes)
        self.each = max(config.grid_columns, health_samples(config, self.conditions))
        rng = Rng(config.seed, -1, self.each * self.conditions, device=teacher.device)
        self.cond, self.uncond = teacher.encode(torch.arange(rng.total, device=teacher.device) // self.each)
        self.z, *self.noises = [rng.normal(teacher.shape) for _ in range(generator.draws)]
        self.eps = rng.normal(teacher.shape)

        def sample(of: slice) -> Tensor:
            return teacher.sample(self.z[of], rows_in(self.cond, of), self.null(of), guidance, config.grid_steps)

        self.x_0 = self.parts(sample)
        self.by_teacher = self.pictures(self.x_0, self.each)

    def null(self, of: slice) -> Cond | None:
        """Those rows' unconditional branch."""
        return None if self.uncond is None else rows_in(self.uncond, of)

    def parts(self, make: Callable[[slice], Tensor]) -> Tensor:
        """make(rows) of all rows, on the CPU."""
        total = self.each * self.conditions
        return torch.cat([make(slice(start, min(total, start + self.rows))).cpu() for start in range(0, total, self.rows)])

    @torch.no_grad()
    def of(self, student: Generator) -> Tensor:
        """The student's x0 from the same noise and conditions."""
        return self.parts(lambda of: student(self.z[of], rows_in(self.cond, of), [each[of] for each in self.noises]))

    def first(self, x: Tensor, count: int) -> Tensor:
        """The first `count` samples of every condition."""
        return x.unflatten(0, (self.conditions, self.each))[:, :count].flatten(0, 1)

    @torch.no_grad()
    def pictures(self, x_0: Tensor, count: int) -> Tensor:
        """Pictures in [0, 1], on the CPU, of the first `count` samples of every condition."""
        parts = self.first(x_0, count).split(self.rows)
        return torch.cat([self.teacher.to_images(part.to(self.teacher.device)).cpu() for part in parts])
