"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models (Lu & Song 2024, arXiv 2410.11081).

Here as its distillation, sCD.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..continuous import Level, TrigFlow
from ..denoiser import Cond, Denoiser
from ..jvp import JVP, bare
from ..methods.scm import SCMConfig
from ..prediction import EDMPreconditioned
from ..rng import Rng
from ..schedule import LogNoise
from .base import Batch, Objective
from .score import per_sample


class SCM(Objective):
    """The consistency function is to be constant along the teacher's trajectories, in the limit of no step at all."""

    Config = SCMConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, student = self.config, self.generator.denoiser
        self.flow = TrigFlow(student.schedule, c.sigma_data or sigma_data_of(student))
        self.law = LogNoise(student.schedule, c.noise_mean + math.log(self.flow.sigma_data), c.noise_std)
        self.start = self.law.level(self.generator.times[0])

    @classmethod
    def uses_real(cls, config: Any) -> bool:
        return True

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def levels(self, rng: Rng) -> Tensor:
        """ln q of a batch, shape (B,)."""
        log_q = self.law(rng)
        if not self.config.max_noise:
            return log_q
        return torch.where(rng.uniform() < self.config.max_noise, self.start, log_q)

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        if batch.real is None:
            raise ValueError("trajectories start from real samples: type --data with pictures, such as --data FOLDER")
        cond, uncond = self.teacher.encode(batch.conditions)
        x_0, log_q = batch.real, self.levels(batch.rng)
        level = self.flow.at(log_q, x_0)
        cos, sin = level.keep, level.way
        x = cos * x_0 + sin * self.flow.sigma_data * batch.rng.normal(x_0.shape[1:]).to(x_0.dtype)
        with torch.no_grad():  # before the student's own pass, for no other may come between it and its backward
            way = self.flow.velocity(lambda x_t, t, c: self.teacher(x_t, t, c, uncond, self.guidance), x, level, cond)
            slope = self.slope(x, log_q, cond, cos * sin * way)
        ours = self.flow.velocity(self.generator.denoiser, x, level, cond)
        warm = min(1.0, (step + 1) / max(1, self.config.tangent_warmup))
        g = tangent(x, ours.detach(), way, slope, cos, sin, warm)
        self.log["tangent"] = g.square().mean().sqrt()
        g = normalised(g, self.config.tangent_floor)
        yield "generator", scm_loss(ours / self.flow.sigma_data, g, self.weight(level))

    def weight(self, level: Level) -> Tensor | float:
        """1 / |dF / d output|: 1 for EDM and v; cos(theta) for eps, which F divides by it."""
        if self.config.weight == "F":
            return 1.0
        return self.flow.sigma_data / self.flow.per_output(self.generator.denoiser.prediction, level)

    def slope(self, x: Tensor, log_q: Tensor, cond: Cond, along: Tensor) -> Tensor:
        """cos(theta) sin(theta) sigma_data dF/dtheta where dx/dtheta is along / (cos(theta) sin(theta)).

        That product is d/d(ln q), which keeps it finite where theta is pi/2.
        """
        student = bare(self.generator.denoiser)
        return JVP[self.config.jvp](
            lambda x, log_q: self.flow.velocity(student, x, log_q, cond),
            (x, log_q),
            (along, torch.ones_like(log_q)),
            self.config.jvp_step,
        )


def sigma_data_of(denoiser: Denoiser) -> float:
    """The standard deviation of the data that a network's preconditioning is made for, else 1."""
    prediction = denoiser.prediction
    return prediction.sigma_data if isinstance(prediction, EDMPreconditioned) else 1.0


def tangent(x: Tensor, ours: Tensor, way: Tensor, slope: Tensor, cos: Tensor, sin: Tensor, warm: float) -> Tensor:
    """g = -cos^2 (sigma_d F - dx/dtheta) - r (cos sin x + slope), r = `warm` (Lu & Song 2024, eq. 6 and algorithm 1).

    `ours` is sigma_d F of the student, `way` dx/dtheta by the teacher, `slope` cos sin sigma_d dF/dtheta; shapes (B, ...),
    in x0 units. With r = 1 it is cos(theta) df/dtheta, zero for the consistency function; r = 0 leads to the teacher.
    """
    return -(cos**2) * (ours - way) - warm * (cos * sin * x + slope)


def normalised(g: Tensor, floor: float) -> Tensor:
    """g / (rms(g) + c) for each sample, shape (B, ...)."""
    return g / (per_sample(g.flatten(1).square().mean(1).sqrt(), g) + floor)


def scm_loss(ours: Tensor, g: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """mean weight (F - sg[F] - g)^2 over batch and elements; the gradient in F = `ours` is -2 weight g / numel.

    Nothing flows into g or weight.
    """
    return (weight * (ours - (ours + g).detach()).square()).mean()
