"""The options of `onestep.objectives.scott`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .consistency import ConsistencyConfig


@dataclass
class SCottConfig(ConsistencyConfig):
    """Options of SCott. The GAN's weight is relative to a distance that is a mean over batch and elements."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {**ConsistencyConfig.DEFAULTS, "critic_lr": 2e-5}

    steps: int = option(3, "stochastic steps of the teacher between the two levels that are compared", minimum=1)
    solver: str = option("ddim", "kind of those steps", choices=("ddim", "er-sde", "er-sde-5"))
    eta: float = option(0.3, "their noise; 0 is the ODE, above 0 the distance alone makes samples blurry", minimum=0.0)
    distance: str = option("l2", "distance of student and target", choices=("l2", "pseudo-huber"))
    gan: float = option(0.4, "weight of the generator's GAN loss; 0 drops the GAN", minimum=0.0)
    gan_loss: str = option("hinge", "adversarial loss", choices=("softplus", "hinge"))
    disc_noise: str = option("renoise", "noise on what the heads are shown", choices=("renoise", "none"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver == "ddim" and self.eta > 1:
            raise ValueError(f"eta {self.eta} is more noise than a ddim step can add; allowed is 0 to 1: type --eta 1")
