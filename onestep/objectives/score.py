"""What score-distillation methods share: generator, teacher and critic, and the two orders in which papers update them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Cond, frozen
from ..prediction import add_noise
from .backtrack import Backtrack
from .base import Batch, Objective


class ScoreDistillation(Objective):
    """A frozen teacher, a generator, and a critic (`fake`) that is the denoiser of the generator's own samples.

    A method writes `generator_loss`. The order of updates is the two time-scale rule of DMD2: every step makes one x, the
    critic learns from it on every step, the generator on every `ratio`-th, before the critic.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.schedule = self.teacher.denoiser.schedule
        self.fake = self.teacher.copy()
        c = self.config
        self.path = Backtrack(self.run, self.teacher, c.backtrack, c.backtrack_nodes, c.backtrack_steps)
        self.settled = self.path.settled

    def kept(self) -> Sequence[nn.Module]:
        return self.path.kept()

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser], "critic": [self.fake]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        cond, uncond = self.teacher.encode(batch.conditions)
        self.path.visit(step, self.fake)
        if self.path.recording(step):
            yield "critic", self.denoising(self.sample(batch, cond), batch, cond)
        else:
            yield from self.updates(batch, step, cond, uncond)

    def updates(self, batch: Batch, step: int, cond: Cond, uncond: Cond | None) -> Iterator[tuple[str, Tensor]]:
        turn = step % self.config.ratio == 0
        x = self.sample(batch, cond, grad=turn)
        if turn:
            with frozen(*self.players()["critic"]):  # spans the caller's backward
                yield "generator", self.generator_loss(x, batch, cond, uncond)
        if (loss := self.critic_loss(x.detach(), batch, cond)) is not None:
            yield "critic", loss

    def sample(self, batch: Batch, cond: Cond, grad: bool = False) -> Tensor:
        """x = G(z), shape (B, ...)."""
        return self.generator.simulate(self.teacher.shape, cond, batch.rng, grad)

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        """What the generator minimises at its samples x; the critic's parameters are frozen, gradients pass through it."""
        raise NotImplementedError

    def critic_loss(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor | None:
        """What the critic minimises at the detached x; None where this method asks nothing of it."""
        return self.denoising(x, batch, cond)

    def denoising(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor:
        """Denoising score matching of the critic on the generator's samples."""
        loss = self.fake.loss(x, cond, batch.rng)
        self.log["denoising"] = loss.detach()
        return loss

    def noised(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x_t, t) at one noise level a sample; gradients pass to x."""
        t = self.schedule.at(batch.rng.uniform(self.config.t_min, self.config.t_max))
        return add_noise(self.schedule, x, batch.rng.normal(x.shape[1:]), t), t

    def real(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond | None) -> Tensor:
        """x0 of the teacher under guidance, or of the recorded teacher that backtracking has reached, which has none."""
        node = self.path.node
        return self.teacher(x_t, t, cond, uncond, self.guidance) if node is None else node(x_t, t, cond)

    @torch.no_grad()
    def estimates(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> tuple[Tensor, Tensor]:
        """(fake, real) x0 estimates of x noised to a random level, for losses that need no gradient through either."""
        x_t, t = self.noised(x, batch)
        return self.fake(x_t, t, cond), self.real(x_t, t, cond, uncond)

    def match(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        """DMD's loss, with gradient w_t alpha_t (s_fake - s_real) / numel in x, w_t = sigma_t^2 / (alpha_t mean|x - real|).

        These are eqs. 7 and 8 of Yin et al. 2023. With s_fake - s_real = alpha_t / sigma_t^2 (fake - real) the gradient is
        alpha_t (fake - real) / mean|x - real| / numel.
        """
        with torch.no_grad():
            x_t, t = self.noised(x, batch)
            fake, real = self.fake(x_t, t, cond), self.real(x_t, t, cond, uncond)
            alpha_t, _ = self.schedule(t, x)
        loss = matching_loss(x, fake, real, alpha_t * per_sample_weight(x.detach(), real))
        self.log["matching"] = loss.detach()
        return loss


class Alternating(ScoreDistillation):
    """The order of SiD and Diff-Instruct: the critic on samples of its own, then the generator on new ones."""

    def updates(self, batch: Batch, step: int, cond: Cond, uncond: Cond | None) -> Iterator[tuple[str, Tensor]]:
        if (loss := self.critic_loss(self.sample(batch, cond), batch, cond)) is not None:
            yield "critic", loss
        if step % self.config.ratio == 0:
            x = self.sample(batch, cond, grad=True)
            with frozen(*self.players()["critic"]):
                yield "generator", self.generator_loss(x, batch, cond, uncond)


def matching_loss(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor | float) -> Tensor:
    """1/2 mean (x - sg[x - g])^2 with g = weight (fake - real), whose gradient in x is g / numel (DMD2, eq. 3).

    x, fake, real have shape (B, ...) in x0 units, `weight` broadcasts against them. With weight alpha^2 / sigma^2 and
    exact denoisers, the expected gradient is that of KL(p_t || q_t). Nothing flows into fake, real or weight.
    """
    gradient = ((fake - real) * weight).detach()
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def per_sample_weight(x: Tensor, real: Tensor) -> Tensor:
    """1 / mean |x - real| over each sample's elements, shape (B, 1, ...): DMD's normaliser (Yin et al. 2023, eq. 8)."""
    distance = (x - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return 1 / per_sample(distance, x)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to broadcast against `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))
