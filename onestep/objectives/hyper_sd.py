"""Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis (Ren et al. 2024, arXiv 2404.13686)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Cond, Denoiser, frozen, unwrap
from ..discriminator import Discriminator, heads_on
from ..generator import Generator
from ..lora import Adapter
from ..methods.hyper_sd import HyperSDConfig, stages_of
from ..second_time import add_second_time, timed
from ..trajectory import Grid, jump
from .base import Batch
from .ladd import blocks
from .segments import SegmentGAN, Segments
from .target import MovingTarget


class HyperSD(MovingTarget):
    """TSCD: a jump from any level of a segment agrees with the jump from the level below, a step of the teacher away.

    Stage by stage there are fewer segments; the last is the whole trajectory. The teacher is the original one throughout.
    """

    Config = HyperSDConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, student, times = self.config, self.generator.denoiser, self.generator.times
        self.stages = stages_of(c)
        self.settled = c.segment_steps * (len(self.stages) - 1)
        self.grid = Grid(student.schedule, c.levels, times[0], self.teacher.device, through=times)
        self.end = end_of(c, self.generator)
        self.segments = Segments(self.grid, self.end == "network")
        self.gan = self._gan() if any(weight for _, weight in self.stages) else None

    @classmethod
    def prepare(cls, config: Any, generator: Generator) -> None:
        """Give the student's network the end of its jumps as an input. Raises ValueError for an adapter."""
        if end_of(config, generator) != "network":
            return
        if isinstance(unwrap(generator.denoiser.network), Adapter):
            raise ValueError(
                "an adapter cannot be told where its jumps end: type --segment-end edge, or --student full to train all "
                "weights"
            )
        add_second_time(generator.denoiser.network)
        generator.denoiser.call = timed(generator.denoiser.call)

    @classmethod
    def uses_real(cls, config: Any) -> bool:
        return True

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        critic: dict[str, list[nn.Module]] = {} if self.gan is None else {"critic": [self.gan.head]}
        return {"generator": [self.generator.denoiser], **critic}

    def _gan(self) -> SegmentGAN:
        teacher, plain = self.teacher, self.teacher.denoiser
        taps = blocks(plain.network, teacher.taps(plain.network), self.config.blocks)
        judge = Denoiser(plain.network, plain.schedule, plain.prediction, plain.call, taps, teacher.tap_output)
        return SegmentGAN(self.grid, judge, self._heads(judge))

    def _heads(self, judge: Denoiser) -> Discriminator:
        cond, _ = self.teacher.encode(torch.zeros(1, dtype=torch.long, device=self.teacher.device))
        return heads_on(judge, self.teacher.shape, self.generator.time(0, torch.zeros(1, device=self.teacher.device)), cond)

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        yield from self.stage(batch, min(step // self.config.segment_steps, len(self.stages) - 1))

    def stage(self, batch: Batch, index: int) -> Iterator[tuple[str, Tensor]]:
        """One step of the stage with that index; the heads learn on the generator's samples, after it."""
        if batch.real is None:
            raise ValueError("Hyper-SD needs real images, whose noised versions it starts from: type --data FOLDER")
        count, weight = self.stages[index]
        cond, uncond = self.teacher.encode(batch.conditions)
        level, end, ceiling = self.segments.draw(batch.rng, count, self.end == "edge")
        x_t = self.grid.noised(batch.real, batch.rng.normal(batch.real.shape[1:]).to(batch.real.dtype), level)
        target = self.landing(x_t, level, end, cond, uncond)
        # the student's own pass comes last: recomputed activations see the end that it was told last
        ours = self.segments.landed(self.generator.denoiser, x_t, level, end, cond)
        loss = F.mse_loss(ours, target)
        self.log["consistency"] = loss.detach()
        if self.gan is None or not weight:
            yield "generator", loss
            return
        with frozen(self.gan.head):  # spans the caller's backward
            fool = self.gan.fool(ours, end, ceiling, cond, batch.rng)
            self.log["gan"] = fool.detach()
            yield "generator", loss + weight * fool
        tell = self.gan.tell(ours.detach(), target, end, ceiling, cond, batch.rng)
        self.log["gan_critic"] = tell.detach()
        yield "critic", tell

    @torch.no_grad()
    def landing(self, x_t: Tensor, level: Tensor, end: Tensor, cond: Cond, uncond: Cond | None) -> Tensor:
        """Psi of the target network from the level below, which a DDIM step of the guided teacher leads to."""
        below = level - 1
        x_0 = self.teacher(x_t, self.grid.time(level, x_t), cond, uncond, self.guidance)
        x_s = jump(x_t, x_0, self.grid.levels(level, x_t), self.grid.levels(below, x_t))
        return self.segments.landed(self.target, x_s, below, end, cond)


def end_of(config: Any, generator: Generator) -> str:
    """network, edge or hidden, with `auto` resolved."""
    if config.segment_end != "auto":
        return config.segment_end
    return "edge" if isinstance(unwrap(generator.denoiser.network), Adapter) else "network"
