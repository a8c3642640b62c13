"""Rectified flow and InstaFlow (Liu et al. 2022, arXiv 2209.03003; Liu et al. 2023, arXiv 2309.06380)."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..data import PairCache
from ..denoiser import Cond, Denoiser, follow
from ..flow import flow_time, flow_velocity, straightness
from ..methods.instaflow import InstaFlowConfig
from ..rng import Rng
from .base import Batch
from .regression import Regression


class InstaFlow(Regression):
    """Reflow on pairs (z, y), new pairs by the student that has learnt it, any number of rounds; then min E d(G(z), y).

    The pairs of the first round are the teacher's. After each round, the moving average of the student makes its own from
    new noise, without guidance, which it has learnt. They lie in the run's folder, and a run that is killed while they are
    made goes on with them. One pass of the student a step.
    """

    Config = InstaFlowConfig
    one_step = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, live = self.config, self.generator.denoiser
        self.settled = c.rounds * c.reflow_steps
        self.source = 0
        self.average: nn.Module | None = None
        if c.rounds:
            self.average = copy.deepcopy(live.network).requires_grad_(False)

    def state(self) -> Mapping[str, nn.Module]:
        return {} if self.average is None else {"rectified": self.average}

    def kept(self) -> Sequence[nn.Module]:
        return list(self.state().values())

    def updated(self, player: str) -> None:
        if self.average is not None:
            follow(self.average, self.generator.denoiser.network, self.config.reflow_ema)

    def stage(self, step: int) -> int:
        """The round of reflow that a step belongs to, from 0 on; `rounds` is the distillation."""
        return min(step // self.config.reflow_steps, self.config.rounds)

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        stage = self.stage(step)
        if stage != self.source:
            self.log.clear()
            self.pairs, self.source = self._rectified(stage, step, len(batch.conditions)), stage
        if stage == self.config.rounds:
            yield from super().step(batch, step)
            return
        z, y, conditions = self.pairs.draw(batch.rng)
        loss = self.reflow(z, y, self.teacher.encode(conditions)[0], batch.rng)
        self.log["reflow"] = loss.detach()
        yield "generator", loss

    def reflow(self, z: Tensor, y: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """E |v(X, tau) - (z - y)|^2 at X = (1 - tau) y + tau z, tau uniform (eq. 1), mean over batch and elements.

        In the student's coordinates X is x_t = alpha_t y + sigma_t z at the time with sigma / (alpha + sigma) nearest tau,
        and its denoiser is the velocity v.
        """
        denoiser = self.generator.denoiser
        t = flow_time(denoiser.schedule, rng.uniform())
        alpha_t, sigma_t = denoiser.schedule(t, z)
        x_t = alpha_t * y + sigma_t * z
        return (flow_velocity(x_t, denoiser(x_t, t, cond), alpha_t, sigma_t) - (z - y)).square().mean()

    def _rectified(self, stage: int, step: int, rows: int) -> PairCache:
        """The pairs of the student after `stage` rounds, made where the stage begins; how straight it is, is logged.

        Raises ValueError where they are gone later on.
        """
        assert self.average is not None
        live, steps = self.generator.denoiser, self.config.pair_steps
        maker = copy.copy(self.teacher)
        maker.denoiser = Denoiser(self.average, live.schedule, live.prediction, live.call)
        first = step == stage * self.config.reflow_steps
        note = self.run / f"rectified-{stage}.json"
        pairs = self.pairs_of(self.run, maker, 1.0, seed=stage, note=note, now=first)
        if first:
            probe = Rng(stage, -1, rows, device=self.teacher.device)
            z, conditions = probe.normal(self.teacher.shape), probe.integers(self.teacher.classes)
            cond, _ = self.teacher.encode(conditions)
            self.log["straightness"] = straightness(maker.denoiser, live.schedule, z, cond, steps)
        return pairs
