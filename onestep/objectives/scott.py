"""SCott: Stochastic Consistency Distillation (Liu et al. 2024, arXiv 2403.01505)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond, frozen
from ..discriminator import GAN, heads_on
from ..methods.scott import SCottConfig
from ..rng import Rng
from ..trajectory import KEEP, jump
from .base import Batch
from .consistency import Consistency


class SCott(Consistency):
    """The teacher leads along a reverse SDE, in `steps` steps, and heads on its features tell samples from real ones.

    Of a stochastic target the distance's minimum is the mean, which is blurred; the GAN is to supply the detail. Passes of
    a step beside those of `Consistency`: `steps` of the teacher (guided), and with the GAN one of it to the tap for the
    generator and, on twice the batch, one for the heads.
    """

    Config = SCottConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gan = self._gan() if self.config.gan else None

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.config.steps

    def _gan(self) -> GAN:
        teacher = self.teacher
        cond, _ = teacher.encode(torch.zeros(1, dtype=torch.long, device=teacher.device))
        t = self.generator.time(0, torch.zeros(1, device=teacher.device))
        head = heads_on(teacher.denoiser, teacher.shape, t, cond)
        kind = GAN if self.config.disc_noise == "renoise" else CleanGAN
        return kind(teacher.denoiser, head, adversary=self.config.gan_loss)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        heads = {} if self.gan is None else {"critic": [self.gan.head]}
        return {**super().players(), **heads}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        cond, uncond = self.teacher.encode(batch.conditions)
        x, loss = self.compared(batch, cond, uncond)
        if self.gan is None or batch.real is None:
            yield "generator", loss
            return
        with frozen(self.gan.head):  # spans the caller's backward
            fool = self.gan.fool(x, cond, batch.rng)
            self.log["gan"] = fool.detach()
            yield "generator", loss + self.config.gan * fool
        tell = self.gan.tell(x.detach(), batch.real, cond, batch.rng)
        self.log["gan_critic"] = tell.detach()
        yield "critic", tell

    def lead(
        self, x_t: Tensor, here: Tensor, there: Tensor, cond: Cond, uncond: Cond | None, guidance: Tensor | float, rng: Rng
    ) -> Tensor:
        keep, eta = KEEP[self.config.solver], self.config.eta
        for _ in range(self.config.steps):
            start, end = self.grid.levels(here, x_t), self.grid.levels(here - 1, x_t)
            x_0 = self.real(x_t, here, cond, uncond, guidance)
            z = rng.normal(x_t.shape[1:]).to(x_t.dtype) if eta else None
            x_t = jump(x_t, x_0, start, end, keep(start, end, eta), z)
            here = here - 1
        return x_t


class CleanGAN(GAN):
    """A GAN whose samples are shown at the least noise of the schedule."""

    def levels(self, rng: Rng) -> Tensor:
        return torch.zeros_like(rng.uniform())
