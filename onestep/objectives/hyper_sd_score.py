"""The one-step stage of Hyper-SD (Ren et al. 2024, arXiv 2404.13686, section 3.3), with its human feedback (section 3.2)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Cond, held
from ..generator import Generator
from ..methods.hyper_sd_score import HyperSDScoreConfig
from ..reward import Rewards
from ..trajectory import Grid
from .base import Batch
from .hyper_sd import HyperSD, end_of
from .score import ScoreDistillation
from .segments import Segments


class HyperSDScore(ScoreDistillation):
    """Distribution matching of a student that TSCD made, held together by a regression on what it made at first."""

    Config = HyperSDScoreConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, student = self.config, self.generator.denoiser
        shown, times = end_of(c, self.generator) == "network", self.generator.times
        if c.anchor_steps > 1 and not shown:
            raise ValueError(
                f"anchor_steps {c.anchor_steps} asks for jumps to levels above clean data, and this student is not told "
                "where they end: type --anchor-steps 1, or --segment-end network for it and the run that it starts from"
            )
        grid = Grid(self.schedule, c.levels, times[0], self.teacher.device, through=times)
        self.segments = Segments(grid, shown)
        self.anchor = held(student) if c.anchor else None
        self.tscd = HyperSD(*args, **kwargs) if c.mix else None
        self.rewards = Rewards.named(c.reward, self.teacher) if c.reward and c.reward_weight else None

    @classmethod
    def prepare(cls, config: Any, generator: Generator) -> None:
        HyperSD.prepare(config, generator)

    @classmethod
    def uses_real(cls, config: Any) -> bool:
        return bool(config.mix)

    def kept(self) -> Sequence[nn.Module]:
        mixed = [] if self.tscd is None else self.tscd.kept()
        return [*super().kept(), *mixed, *(each for each in (self.anchor, self.rewards) if each is not None)]

    def state(self) -> Mapping[str, nn.Module]:
        return {} if self.tscd is None else self.tscd.state()

    def updated(self, player: str) -> None:
        if self.tscd is not None:
            self.tscd.updated(player)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        mixed = [] if self.tscd is None else self.tscd.players().get("critic", [])
        return {"generator": [self.generator.denoiser], "critic": [self.fake, *mixed]}

    def updates(self, batch: Batch, step: int, cond: Cond, uncond: Cond | None) -> Iterator[tuple[str, Tensor]]:
        mix = self.config.mix
        if self.tscd is None or (step + 1) % mix:
            yield from super().updates(batch, step, cond, uncond)
            return
        yield from self.tscd.stage(batch, step // mix % len(self.tscd.stages))
        self.log |= self.tscd.log

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        c, loss = self.config, x.new_zeros(())
        if c.matching:
            loss = loss + c.matching * self.match(x, batch, cond, uncond)
        if self.rewards is not None:
            # conditions by name are strings or numbers of Python: they have to be on the CPU
            reward = self.rewards(self.teacher.decode(x), self.teacher.named(batch.conditions.tolist()))
            self.log["reward"] = reward.detach()
            loss = loss + c.reward_weight * reward
        if self.anchor is not None:
            z = batch.rng.normal(self.teacher.shape).to(x.dtype)
            distance = F.mse_loss(self.generator.first(z, cond), self.anchored(z, cond))
            self.log["anchor"] = distance.detach()
            loss = loss + c.anchor * distance
        return loss

    def critic_loss(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor | None:
        return self.denoising(x, batch, cond) if self.config.matching else None

    @torch.no_grad()
    def anchored(self, z: Tensor, cond: Cond) -> Tensor:
        """x0 that the student of the start makes of the noise z in `anchor_steps` jumps, all of them without noise."""
        assert self.anchor is not None
        steps, levels = self.config.anchor_steps, self.config.levels
        x = self.generator.input_scale * z
        for index in range(steps, 0, -1):
            level, end = (torch.full((len(z),), levels * i // steps, device=z.device) for i in (index, index - 1))
            x = self.segments.landed(self.anchor, x, level, end, cond)
        return x
