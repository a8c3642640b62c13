"""LADD: Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation (Sauer et al. 2024).

arXiv 2403.12015.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import PairCache
from ..denoiser import Cond, Denoiser, frozen
from ..discriminator import GAN, Discriminator, heads_on
from ..methods.ladd import LADDConfig
from ..rng import Rng
from ..schedule import LogNormal
from .base import Batch, Objective


class LADD(Objective):
    """A GAN on the features that the frozen teacher has of noised samples; no score is matched.

    Every step makes one x; the heads learn from it on every step, the generator on every `ratio`-th, before them.
    """

    Config = LADDConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, teacher = self.config, self.teacher
        network, plain = teacher.denoiser.network, teacher.denoiser
        taps = blocks(network, teacher.taps(network), c.blocks)
        judge = Denoiser(network, plain.schedule, plain.prediction, plain.call, taps, teacher.tap_output)
        logit_normal = c.noise == "logit-normal"
        law = LogNormal(plain.schedule, c.noise_mean, c.noise_std, teacher.device) if logit_normal else None
        self.gan = PenalisedGAN(judge, self._discriminator(judge), c.gan_loss, c.r1, law)
        self.pairs = PairCache(self.folder, teacher, c.pairs, c.pair_steps, self.guidance) if c.pairs else None

    @classmethod
    def uses_real(cls, config: LADDConfig) -> bool:
        return not config.pairs

    def _discriminator(self, judge: Denoiser) -> Discriminator:
        cond, _ = self.teacher.encode(torch.zeros(1, dtype=torch.long, device=self.teacher.device))
        return heads_on(judge, self.teacher.shape, self.generator.time(0, torch.zeros(1, device=self.teacher.device)), cond)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser], "critic": [self.gan.head]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        real, conditions = self._real(batch)
        cond, _ = self.teacher.encode(conditions)
        turn = step % self.config.ratio == 0
        x = self.generator.simulate(self.teacher.shape, cond, batch.rng, turn)
        if turn:
            with frozen(self.gan.head):  # spans the caller's backward
                fool = self.gan.fool(x, cond, batch.rng)
                self.log["gan"] = fool.detach()
                yield "generator", fool
        tell = self.gan.tell(x.detach(), real, cond, batch.rng)
        self.log["gan_critic"] = tell.detach()
        yield "critic", tell

    def _real(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the generator's samples are compared with, and the conditions of both."""
        if self.pairs is not None:
            _, y, conditions = self.pairs.draw(batch.rng)
            return y, conditions
        if batch.real is None:
            raise ValueError("LADD needs real images: type --data FOLDER, or --pairs 2048 to take the teacher's samples")
        return batch.real, batch.conditions


class PenalisedGAN(GAN):
    """A GAN on a frozen network's features, with a law of noise levels and a gradient penalty of its own."""

    def __init__(self, denoiser: Denoiser, head: Discriminator, adversary: str, r1: float, law: LogNormal | None):
        super().__init__(denoiser, head, adversary=adversary)
        self.r1, self.law = r1, law

    def levels(self, rng: Rng) -> Tensor:
        return super().levels(rng) if self.law is None else self.law(rng)

    def tell(self, x: Tensor, real: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The critic's loss + r1/2 mean |d D(real_t) / d feature|^2, a mean over real samples and heads.

        R1 (Mescheder et al. 2018, eq. 9) with respect to what the heads are given, not to x_t (Sauer et al. 2023): the
        teacher need not be differentiated twice.
        """
        features = [feature.detach().requires_grad_(self.r1 > 0) for feature in self.both(x, real, cond, rng)]
        logits = self.head(features)
        loss = self.told(logits)
        if not self.r1:
            return loss
        by_real = logits[len(x) :]
        slopes = torch.autograd.grad(by_real.sum(), features, create_graph=True)
        return loss + self.r1 / 2 * sum(slope.square().sum() for slope in slopes) / by_real.numel()


def blocks(network: nn.Module, taps: Sequence[str], count: int) -> list[str]:
    """`count` modules evenly spread over the list that a teacher's tap is in, the last included; its taps if in none."""
    parent = taps[0].rpartition(".")[0]
    group = network.get_submodule(parent)
    if not isinstance(group, nn.ModuleList):
        return list(taps)
    count = min(count, len(group))
    return [f"{parent}.{(i + 1) * len(group) // count - 1}" for i in range(count)]
