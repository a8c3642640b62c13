"""The options of `onestep.objectives.lcm`."""

from dataclasses import dataclass

from ..config import option
from .cd import CDConfig


@dataclass
class LCMConfig(CDConfig):
    """Options of LCM."""

    levels: int = option(
        50, "noise levels of the trajectories; those of a chain (--student-steps) are among them", minimum=1
    )
    guidance_min: float = option(
        0.0, "least guidance, drawn for each sample; 0 with guidance_max 0: --guidance", minimum=0.0
    )
    guidance_max: float = option(0.0, "largest guidance", minimum=0.0)
    embed_guidance: bool = option(False, "give the guidance to the student, a UNet of Stable Diffusion, as an input")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_min, self.guidance_max
        if low > high:
            raise ValueError(
                f"guidance_min {low} is above guidance_max {high}; type for example "
                f"--guidance-min {high} --guidance-max {low}"
            )
        if self.embed_guidance and low == high:
            raise ValueError(
                "embed_guidance tells the student a guidance that never changes; type for example "
                "--guidance-min 3 --guidance-max 15, or leave it out"
            )
