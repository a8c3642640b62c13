"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al. 2024, arXiv 2405.14867)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import PairCache
from ..denoiser import Cond
from ..discriminator import GAN, Discriminator, heads_on
from ..methods.dmd2 import DMD2Config
from .base import Batch
from .score import ScoreDistillation, matching_loss, per_sample_weight


class DMD2(ScoreDistillation):
    """Distribution matching with a GAN critic on the fake denoiser's own features, and a two time-scale update rule."""

    Config = DMD2Config

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c = self.config
        self.gan = GAN(self.fake, self._discriminator(), c.gan_t_max) if c.gan or c.gan_critic else None
        self.pairs = None
        if c.regression:
            self.pairs = PairCache(self.folder, self.teacher, c.pairs, c.pair_steps, self.guidance)

    @classmethod
    def uses_real(cls, config: DMD2Config) -> bool:
        return bool(config.gan_critic)

    def _discriminator(self) -> Discriminator:
        cond, _ = self.teacher.encode(torch.zeros(1, dtype=torch.long, device=self.teacher.device))
        t = self.generator.time(0, torch.zeros(1, device=self.teacher.device))
        return heads_on(self.fake, self.teacher.shape, t, cond)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        critic = [self.fake] if self.gan is None else [self.fake, self.gan.head]
        return {"generator": [self.generator.denoiser], "critic": critic}

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        loss = x.new_zeros(())
        if self.config.matching:
            loss = loss + self.config.matching * self.match(x, batch, cond, uncond)
        if self.config.gan and self.gan is not None:
            fool = self.gan.fool(x, cond, batch.rng)
            self.log["gan"] = fool.detach()
            loss = loss + self.config.gan * fool
        if self.pairs is not None:
            z, y, conditions = self.pairs.draw(batch.rng)
            regression = F.mse_loss(self.generator.first(z, self.teacher.encode(conditions)[0]), y)
            self.log["regression"] = regression.detach()
            loss = loss + self.config.regression * regression
        return loss

    def match(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        fake, real = self.estimates(x, batch, cond, uncond)
        loss = matching_loss(x, fake, real, per_sample_weight(x.detach(), real))
        self.log["matching"] = loss.detach()
        return loss

    def critic_loss(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor | None:
        if not self.config.matching and not self.config.gan:
            return None  # regression alone asks nothing of a critic
        if not self.config.gan_critic or self.gan is None:
            return self.denoising(x, batch, cond)
        if batch.real is None:
            raise ValueError("DMD2's GAN needs real images: type --data FOLDER, or --gan 0 --gan-critic 0 to go without")
        if self.config.share_critic_pass:
            loss, features = self.fake.loss_with_features(x, cond, batch.rng)
            self.log["denoising"] = loss.detach()
            tell = self.gan.tell_by(features, batch.real, cond, batch.rng)
        else:
            loss = self.denoising(x, batch, cond)
            tell = self.gan.tell(x, batch.real, cond, batch.rng)
        self.log["gan_critic"] = tell.detach()
        return loss + self.config.gan_critic * tell
