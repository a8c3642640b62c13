"""AGD: classifier-free guidance learnt by adapters, for one pass a step (Jensen et al. 2025, arXiv 2503.07274)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.trajectories import GuidedTrajectories, Point, guided_way, match
from ..denoiser import body
from ..generator import Generator
from ..guided import KEY, adapter_for, count
from ..guided_sampler import GuidedSampler
from ..methods.agd import AGDConfig
from ..teacher import Teacher
from ..trajectory import Grid, gains
from .base import Batch, Objective


class AGD(Objective):
    """min E m_t |o(x_t, t, c; w) - (o_uncond + w (o_cond - o_uncond))|^2 over the adapters (section 4 of the paper).

    o is the network's raw output with adapters, on the frozen base; x_t are points of trajectories that were guided by w.
    m_t is 1, or the square of `onestep.trajectory.gains` over its mean.
    """

    Config = AGDConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c = self.config
        assert isinstance(self.generator, GuidedSampler)
        self.generator.guidance = self.guidance  # of the pictures
        self.grid = Grid(self.teacher.denoiser.schedule, c.trajectory_steps, device=self.teacher.device)
        squares = gains(self.grid, self.teacher.denoiser.prediction) ** (2 if c.weight == "step" else 0)
        self.weights = (squares / squares[1:].mean()).float()  # by level
        limits = (c.guidance_min, c.guidance_max)
        given = (c.trajectories, c.trajectory_steps, c.trajectory_points, *limits)
        self.cache = (
            GuidedTrajectories(self.folder, self.teacher, *given, batch=c.trajectory_batch) if c.trajectories else None
        )

    @classmethod
    def student(cls, config: Any, teacher: Teacher, steps: int) -> Generator:
        """Adapters on the teacher's own network, sampled in so many steps; prints their number of parameters.

        Raises ValueError for a teacher that cannot be guided, or has no place for adapters.
        """
        if not teacher.unconditional:
            raise ValueError("agd needs an unconditional branch, which this teacher lacks: type another --teacher")
        if teacher.copies.checkpointing:
            raise ValueError("blocks that are recomputed do not see agd's adapters: leave --gradient-checkpointing out")
        network = body(teacher.denoiser.network)
        limits, kind = (config.guidance_min, config.guidance_max), type(teacher.pipeline).__name__
        adapter = adapter_for(network, config.adapter, config.hidden, config.share, kind, limits)
        share = count(adapter) / count(network)
        print(f"{config.adapter} adapters of width {adapter.config.hidden}: {count(adapter):,} parameters, {share:.2%}")
        return GuidedSampler(teacher.guided_by(adapter), steps, teacher.facts.guidance)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        point = self.cache.draw(batch.rng) if self.cache else self.on_the_way(batch)
        cond, _ = self.teacher.encode(point.conditions)
        output = self.generator.denoiser.output(point.x_t, point.t, cond | {KEY: point.guidance})
        weight = match(self.weights[point.level], output)
        loss = (weight * (output - point.output.to(output.dtype)).square()).mean()
        self.log["guidance"] = loss.detach()
        yield "generator", loss

    def on_the_way(self, batch: Batch) -> Point:
        """A point of a new trajectory for each condition of the batch, at a step of its own."""
        rng, c = batch.rng, self.config
        z, w = rng.normal(self.teacher.shape), rng.uniform(c.guidance_min, c.guidance_max)
        stop = rng.integers(self.grid.size) + 1
        cond, uncond = self.teacher.encode(batch.conditions)
        assert uncond is not None
        x, target = z, z
        for level, x_t, output in guided_way(self.teacher.denoiser, self.grid, z, cond, uncond, w):
            here = match(level == stop, z)
            x, target = torch.where(here, x_t, x), torch.where(here, output, target)
        return Point(x, stop, self.grid.time(stop, x), target, w, batch.conditions)
