"""The options of `onestep.objectives.f_distill`."""

from dataclasses import dataclass

from ..config import option
from .dmd2 import DMD2Config


@dataclass
class FDistillConfig(DMD2Config):
    """Options of f-distill: those of DMD2, whose GAN it needs, and the divergence."""

    divergence: str = option(
        "js",
        "f-divergence that is minimised",
        choices=("reverse-kl", "forward-kl", "js", "softened-reverse-kl", "squared-hellinger", "neyman", "jeffreys"),
    )
    density_decay: float = option(
        0.95, "decay of the moving means that the density ratio is divided by", minimum=0.0, below=1.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gan_critic:
            raise ValueError(
                "f-distill takes the density ratio from the discriminator, and gan_critic 0 does not train one; "
                "type for example --gan-critic 0.01, or --method dmd2 for the reverse KL without a GAN"
            )
        if self.gan_t_max < self.t_max:
            raise ValueError(
                f"gan_t_max {self.gan_t_max} is below t_max {self.t_max}: the density ratio would be read where the "
                f"discriminator learns nothing; type --gan-t-max {self.t_max} or more, or --t-max {self.gan_t_max}"
            )
