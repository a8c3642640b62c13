"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al. 2024, arXiv 2405.14867)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import option
from ..data import PairCache
from ..denoiser import Cond
from ..discriminator import GAN, Discriminator, heads_on
from .base import Batch
from .score import ScoreConfig, ScoreDistillation, matching_loss, per_sample_weight


@dataclass
class DMD2Config(ScoreConfig):
    """Options of DMD2. GAN weights are relative to losses that are means over batch and elements."""

    ratio: int = option(5, "critic updates for each generator update (the two time-scale rule)", minimum=1)
    matching: float = option(1.0, "weight of the distribution matching loss", minimum=0.0)
    gan: float = option(3e-3, "weight of the generator's GAN loss; 0 together with gan_critic 0 drops the GAN", minimum=0.0)
    gan_critic: float = option(1e-2, "weight of the critic's GAN loss", minimum=0.0)
    gan_t_max: float = option(1.0, "most noise of the GAN's samples, as a fraction of the schedule", above=0.0)
    share_critic_pass: bool = option(False, "the critic's GAN reads its samples from the pass of its denoising loss")
    regression: float = option(0.0, "weight of the regression on teacher samples (DMD, Yin et al. 2023, eq. 9)", minimum=0.0)
    pairs: int = option(2048, "teacher samples to regress on, made once and kept in the cache folder", minimum=1)
    pair_steps: int = option(50, "teacher steps for each of those samples", minimum=1)

    def __post_init__(self) -> None:
        if self.share_critic_pass and not self.gan_critic:
            raise ValueError(
                "share_critic_pass saves a pass of the critic's GAN, and gan_critic 0 has none; type for example "
                "--gan-critic 0.01, or leave it out"
            )
        if self.share_critic_pass and self.gan_t_max != 1:
            raise ValueError(
                "share_critic_pass gives the GAN the noise levels of the denoising loss, those of the whole schedule, and "
                f"gan_t_max is {self.gan_t_max}; type --gan-t-max 1, or leave it out"
            )


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
