"""MeanFlow: Mean Flows for One-step Generative Modeling (Geng et al. 2025, arXiv 2505.13447), on a teacher."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..continuous import StraightFlow
from ..denoiser import Cond, unwrap
from ..generator import Generator
from ..jvp import JVP, bare
from ..lora import Adapter
from ..methods.meanflow import MeanFlowConfig
from ..rng import Rng
from ..schedule import LogNoise, precise
from ..second_time import KEY, add_second_time, layers, timed
from .base import Batch, Objective
from .score import per_sample


class MeanFlow(Objective):
    """u(x, r, t), the mean velocity between r and t, from the velocity v at t and its own derivative along v.

    The second time r is an input that full students get; one without it, such as an adapter, is trained for r = 0 alone.
    """

    Config = MeanFlowConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, student = self.config, self.generator.denoiser
        self.guidance = self.ends_at(c, self.guidance)  # grids show that teacher
        # levels above the student's start are drawn too: without them the derivative there runs away
        self.flow, self.law = StraightFlow(student.schedule), LogNoise(student.schedule, c.time_mean, c.time_std)
        self.start = self.law.level(self.generator.times[0])
        self.two_times = bool(layers(unwrap(student.network)))

    @classmethod
    def prepare(cls, config: Any, generator: Generator) -> None:
        denoiser = generator.denoiser
        if not isinstance(denoiser.network, Adapter):
            add_second_time(denoiser.network)
            denoiser.call = timed(denoiser.call)

    @classmethod
    def uses_real(cls, config: Any) -> bool:
        return True

    @classmethod
    def ends_at(cls, config: Any, guidance: float) -> float:
        return guidance if config.velocity == "teacher" else 1.0

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def levels(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """(r, ln q of t) of a batch, r <= t, each of shape (B,)."""
        if not self.two_times:
            log_q = self._at_start(self._draw(rng), rng)
            return torch.zeros_like(log_q), log_q
        c, one, other, part = self.config, self._draw(rng), self._draw(rng), rng.uniform()
        log_q, r = self._at_start(torch.maximum(one, other), rng), torch.minimum(one, other).sigmoid()
        r = torch.where(part < c.instantaneous, log_q.sigmoid(), r)
        return torch.where(part >= 1 - c.to_data, 0.0, r), log_q

    def _at_start(self, log_q: Tensor, rng: Rng) -> Tensor:
        """Some of the levels at the one where sampling starts, which a law in its far tail would not reach."""
        return torch.where(rng.uniform() < self.config.max_noise, self.start, log_q)

    def _draw(self, rng: Rng) -> Tensor:
        return self.law(rng) if self.config.time_law == "logit-normal" else self.law.cut(precise(rng.uniform()).logit())

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        if batch.real is None:
            raise ValueError("trajectories start from real samples: type --data with pictures, such as --data FOLDER")
        cond, uncond = self.teacher.encode(batch.conditions)
        x_0, (r, log_q) = batch.real, self.levels(batch.rng)
        eps, level = batch.rng.normal(x_0.shape[1:]).to(x_0.dtype), self.flow.at(log_q, x_0)
        t = level.way
        x = (1 - t) * x_0 + t * eps
        ours = cond | {KEY: r} if self.two_times else cond
        with torch.no_grad():  # before the student's own pass, for no other may come between it and its backward
            v = eps - x_0
            if self.config.velocity == "teacher":
                v = self.flow.velocity(lambda x_t, t, c: self.teacher(x_t, t, c, uncond, self.guidance), x, level, cond)
            target = v - (t - per_sample(r, x).to(t.dtype)) * self.slope(x, log_q, ours, v, t)
        error = self.flow.velocity(self.generator.denoiser, x, level, ours) - target
        if self.config.unit == "output":
            error = error / self.flow.per_output(self.generator.denoiser.prediction, level)
        self.log["mean_flow"] = error.detach().square().mean()
        yield "generator", weighted(error, self.config.power, self.config.power_floor)

    def slope(self, x: Tensor, log_q: Tensor, cond: Cond, v: Tensor, t: Tensor) -> Tensor:
        """du/dt = v d_x u + d_t u; by way of d/d(ln q) = t (1 - t) d/dt, for ln q is what the network's time follows."""
        student, rate = bare(self.generator.denoiser), t * (1 - t)
        return (
            JVP[self.config.jvp](
                lambda x, log_q: self.flow.velocity(student, x, log_q, cond),
                (x, log_q),
                (rate * v, torch.ones_like(log_q)),
                self.config.jvp_step,
            )
            / rate
        )


def weighted(error: Tensor, power: float, floor: float) -> Tensor:
    """mean over the batch of s / sg(s + c)^p, s the mean square of a sample's error (Geng et al. 2025, eq. 22)."""
    square = error.flatten(1).square().mean(1)
    return (square / (square.detach() + floor) ** power).mean()
