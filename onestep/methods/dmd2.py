"""The options of `onestep.objectives.dmd2`."""

from dataclasses import dataclass

from ..config import option
from .score import ScoreConfig


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
        super().__post_init__()
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
