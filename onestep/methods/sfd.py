"""The options of `onestep.objectives.sfd`."""

from dataclasses import dataclass

from ..config import option
from .sid import SiDConfig


@dataclass
class SFDConfig(SiDConfig):
    """Options of SFD. The noise levels are the authors' on CIFAR-10 (DDPM), where 0.712 is sigma / alpha = 13."""

    forget: str | None = option(None, "what to forget: a class, by number or name, or words in prompts")
    override: str = option("random", "in its place: a class, words, random, classifier or classifier-sampled")
    forgetting: float = option(0.01, "weight of the generator's loss on what is forgotten", minimum=0.0)
    forgetting_critic: float = option(0.01, "weight of the critic's loss on what is forgotten", minimum=0.0)
    forget_every: int = option(1, "one sample of what is forgotten for so many of what remains", minimum=1)
    t_min: float = option(0.038, "least noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
    t_max: float = option(0.712, "most noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
