"""The options of `onestep.objectives.ladd`."""

from dataclasses import dataclass

from ..config import MethodConfig, option


@dataclass
class LADDConfig(MethodConfig):
    """Options of LADD."""

    ratio: int = option(1, "critic updates for each generator update", minimum=1)
    gan_loss: str = option("hinge", "adversarial loss", choices=("softplus", "hinge"))
    r1: float = option(1e-5, "weight of the gradient penalty on real samples; 0 is off", minimum=0.0)
    blocks: int = option(4, "transformer blocks of the teacher with a head each; of a UNet it is the mid block", minimum=1)
    noise: str = option("logit-normal", "law of the noise levels", choices=("logit-normal", "uniform"))
    noise_mean: float = option(1.0, "mean of ln(sigma/alpha), if logit-normal")
    noise_std: float = option(1.0, "standard deviation of ln(sigma/alpha), if logit-normal", above=0.0)
    pairs: int = option(0, "samples of the teacher to take for real ones; 0 takes real images", minimum=0)
    pair_steps: int = option(50, "teacher steps for each of those samples", minimum=1)
