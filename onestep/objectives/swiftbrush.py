"""SwiftBrush (Nguyen & Tran 2024, arXiv 2312.05239), with the clamped CLIP loss of SwiftBrush v2 (arXiv 2408.14176)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond, guided
from ..methods.swiftbrush import SwiftBrushConfig
from ..prediction import add_noise
from .base import Batch
from .clip_loss import clip_on
from .score import per_sample
from .vsd import VSD


class SwiftBrush(VSD):
    """VSD with the same guidance kappa on teacher and critic, whose null branch is trained on the generator too.

    Guidance on both has the unguided teacher as its fixed point, for every kappa above 0; guidance on the teacher alone
    has the guided one. Recorded teachers of backtracking have no guidance, and are compared with an unguided critic.
    """

    Config = SwiftBrushConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, device = self.config, self.teacher.device
        null = self.teacher.encode(torch.zeros(1, dtype=torch.long, device=device))[1]
        if null is None:
            raise ValueError("this teacher has no unconditional branch, which this method guides with; type --method vsd")
        self.null, self.kappas, self.on_critic = null, self.span(), c.guidance_on == "both"
        self.guidance = self.ends_at(c, self.guidance)  # grids show that teacher
        self.clip = clip_on(self.teacher, c.clip_model, c.clip_weights, c.clip_tau) if c.clip else None
        self.clip_weight = c.clip

    @classmethod
    def ends_at(cls, config: Any, guidance: float) -> float:
        return 1.0 if config.guidance_on == "both" else guidance

    def span(self) -> tuple[float, float]:
        """The least and the largest kappa."""
        return self.guidance, self.guidance

    def kept(self) -> Sequence[nn.Module]:
        return [*super().kept(), *([] if self.clip is None else [self.clip])]

    def updates(self, batch: Batch, step: int, cond: Cond, uncond: Cond | None) -> Iterator[tuple[str, Tensor]]:
        c = self.config
        self.clip_weight = c.clip * max(0.0, 1 - step / c.clip_steps) if c.clip_steps else c.clip
        yield from super().updates(batch, step, cond, uncond)

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        loss = super().generator_loss(x, batch, cond, uncond)
        if self.clip is None or not self.clip_weight:
            return loss
        # prompts are strings: their numbers have to be on the CPU, as for the teacher's table
        clip = self.clip(self.teacher.decode(x), self.teacher.named(batch.conditions.tolist()))
        self.log["clip"] = clip.detach()
        return loss + self.clip_weight * clip

    def compared(self, x_t: Tensor, t: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> tuple[Tensor, Tensor]:
        if self.path.node is not None:
            return self.fake(x_t, t, cond), self.path.node(x_t, t, cond)
        kappa = None
        if self.kappas != (1.0, 1.0):
            kappa = per_sample(batch.rng.uniform(*self.kappas).to(x_t.dtype), x_t)
        fake = guided(self.fake, x_t, t, cond, uncond, kappa if self.on_critic else None)
        return fake, guided(self.teacher.denoiser, x_t, t, cond, uncond, kappa)

    def denoising(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor:
        """mean alpha_t^2 (eps_critic(x_t, t, c') - eps)^2, t uniform, c' null with probability `cond_dropout` and else c."""
        drop = batch.rng.uniform() < self.config.cond_dropout
        kept = {key: torch.where(per_sample(drop, each), self.null[key], each) for key, each in cond.items()}
        t, eps = self.schedule.at(batch.rng.uniform()), batch.rng.normal(x.shape[1:])
        error = self.fake(add_noise(self.schedule, x, eps, t), t, kept) - x
        loss = (denoising_weight(*self.schedule(t, x)) * error.square()).mean()
        self.log["denoising"] = loss.detach()
        return loss


def denoising_weight(alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The weight on |x0_critic - x|^2 that is alpha^2 on |eps_critic - eps|^2: alpha^4 / sigma^2.

    Divided by alpha^2 + sigma^2, which is 1 for VP: the weight is then a function of sigma / alpha alone.
    """
    # a flow may draw t = 0, where the error is 0 too
    return alpha_t**4 / ((alpha_t**2 + sigma_t**2) * sigma_t.clamp_min(1e-4) ** 2)
