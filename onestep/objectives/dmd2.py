"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al. 2024, arXiv 2405.14867)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MethodConfig, option
from ..data import PairCache
from ..denoiser import Cond, frozen, stack
from ..discriminator import Discriminator
from ..prediction import add_noise
from .base import Batch, Objective


@dataclass
class DMD2Config(MethodConfig):
    """Options of DMD2. GAN weights are relative to losses that are means over batch and elements."""

    ratio: int = option(5, "critic updates for each generator update (the two time-scale rule)", minimum=1)
    matching: float = option(1.0, "weight of the distribution matching loss", minimum=0.0)
    gan: float = option(3e-3, "weight of the generator's GAN loss; 0 together with gan_critic 0 drops the GAN", minimum=0.0)
    gan_critic: float = option(1e-2, "weight of the critic's GAN loss", minimum=0.0)
    t_min: float = option(0.02, "least noise of the matching loss, as a fraction of the schedule", minimum=0.0)
    t_max: float = option(0.98, "most noise of the matching loss, as a fraction of the schedule", minimum=0.0)
    regression: float = option(0.0, "weight of the regression on teacher samples (DMD, Yin et al. 2023, eq. 9)", minimum=0.0)
    pairs: int = option(2048, "teacher samples to regress on, made once and kept in the run's folder", minimum=1)
    pair_steps: int = option(50, "teacher steps for each of those samples", minimum=1)


def matching_loss(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """1/2 mean (x - sg[x - g])^2 with g = weight (fake - real), whose gradient in x is g / numel (DMD2, eq. 3).

    x, fake, real have shape (B, ...) in x0 units, `weight` broadcasts against them. With weight alpha^2 / sigma^2 and
    exact denoisers, the expected gradient is that of KL(p_t || q_t). Nothing flows into fake, real or weight.
    """
    gradient = torch.nan_to_num((fake - real) * weight).detach()
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def per_sample_weight(x: Tensor, real: Tensor) -> Tensor:
    """1 / mean |x - real| over each sample's elements, shape (B, 1, ...): DMD's normaliser (Yin et al. 2023, eq. 8)."""
    distance = (x - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return 1 / distance.view(-1, *(1,) * (x.ndim - 1))


class DMD2(Objective):
    """Distribution matching with a GAN critic on the fake denoiser's own features, and a two time-scale update rule."""

    Config = DMD2Config

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.schedule = self.teacher.denoiser.schedule
        self.fake = self.teacher.copy()
        self.head = self._discriminator() if self.config.gan or self.config.gan_critic else None
        self.pairs = None
        if self.config.regression:
            self.pairs = PairCache(self.folder, self.teacher, self.config.pairs, self.config.pair_steps, self.guidance)

    @classmethod
    def uses_real(cls, config: DMD2Config) -> bool:
        return bool(config.gan_critic)

    def _discriminator(self) -> Discriminator:
        device = self.teacher.device
        with torch.no_grad():
            cond, _ = self.teacher.encode(torch.zeros(1, dtype=torch.long, device=device))
            t = self.generator.time(0, torch.zeros(1, device=device))
            features = self.fake.features(torch.zeros(1, *self.teacher.shape, device=device), t, cond)
        return Discriminator(features).to(device)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        critic = [self.fake] if self.head is None else [self.fake, self.head]
        return {"generator": [self.generator.denoiser], "critic": critic}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        cond, uncond = self.teacher.encode(batch.conditions)
        update_generator = step % self.config.ratio == 0
        x = self._sample(batch, cond, grad=update_generator)
        if update_generator:
            with frozen(self.fake, self.head):  # spans the caller's backward
                yield "generator", self._generator_loss(x, batch, cond, uncond)
        if not self.config.matching and not self.config.gan:
            return  # regression alone asks nothing of a critic
        x = x.detach()
        denoising = self.fake.loss(x, cond, batch.rng)
        self.log["denoising"] = denoising.detach()
        yield "critic", denoising + self._tell(x, batch, cond)

    def _sample(self, batch: Batch, cond: Cond, grad: bool) -> Tensor:
        """x = G(z), shape (B, ...); in a chain, backward simulation: a random number of calls, gradient in the last."""
        rng, generator = batch.rng, self.generator
        z = rng.normal(self.teacher.shape)
        last = rng.shared_integer(len(generator.times))
        with torch.set_grad_enabled(grad and last == 0):
            x = generator.first(z, cond)
        for index in range(1, last + 1):
            with torch.set_grad_enabled(grad and index == last):
                x = generator.later(x, rng.normal(self.teacher.shape), index, cond)
        return x

    def _generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        loss = x.new_zeros(())
        if self.config.matching:
            loss = loss + self.config.matching * self._match(x, batch, cond, uncond)
        if self.config.gan and self.head is not None:
            fool = F.softplus(-self.head(self._features(x, batch, cond))).mean()
            self.log["gan"] = fool.detach()
            loss = loss + self.config.gan * fool
        if self.pairs is not None:
            z, y, conditions = self.pairs.draw(batch.rng)
            regression = F.mse_loss(self.generator.first(z, self.teacher.encode(conditions)[0]), y)
            self.log["regression"] = regression.detach()
            loss = loss + self.config.regression * regression
        return loss

    @torch.no_grad()
    def _gradient_at(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> tuple[Tensor, Tensor]:
        """(fake, real) x0 estimates of x noised to a random time."""
        t = self.schedule.at(batch.rng.uniform(self.config.t_min, self.config.t_max))
        x_t = add_noise(self.schedule, x, batch.rng.normal(x.shape[1:]), t)
        return self.fake(x_t, t, cond), self.teacher(x_t, t, cond, uncond, self.guidance)

    def _match(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        fake, real = self._gradient_at(x, batch, cond, uncond)
        loss = matching_loss(x, fake, real, per_sample_weight(x.detach(), real))
        self.log["matching"] = loss.detach()
        return loss

    def _features(self, x: Tensor, batch: Batch, cond: Cond) -> list[Tensor]:
        t = self.schedule.at(batch.rng.uniform())
        return self.fake.features(add_noise(self.schedule, x, batch.rng.normal(x.shape[1:]), t), t, cond)

    def _tell(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor | float:
        """The critic's GAN loss, softplus(D(fake)) + softplus(-D(real)), from one pass over both halves."""
        if not self.config.gan_critic or self.head is None:
            return 0.0
        if batch.real is None:
            raise ValueError("DMD2's GAN needs real images: type --data FOLDER, or --gan 0 --gan-critic 0 to go without")
        both, conds = torch.cat([x, batch.real]), stack(cond, cond)
        t = self.schedule.at(torch.cat([batch.rng.uniform(), batch.rng.uniform()]))
        noise = torch.cat([batch.rng.normal(x.shape[1:]), batch.rng.normal(x.shape[1:])])
        fake, real = self.head(self.fake.features(add_noise(self.schedule, both, noise, t), t, conds)).chunk(2)
        loss = F.softplus(fake).mean() + F.softplus(-real).mean()
        self.log["gan_critic"] = loss.detach()
        return self.config.gan_critic * loss
