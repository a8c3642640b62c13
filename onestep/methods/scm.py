"""The options of `onestep.objectives.scm`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class SCMConfig(MethodConfig):
    """Options of sCM."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "beta2": 0.99, "clip_norm": 1.0}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # trajectories begin at the schedule's most noise

    sigma_data: float = option(0.0, "std of the data; 0: the network's own if it is EDM's, else 1", minimum=0.0)
    noise_mean: float = option(-0.1, "mean of ln tan(theta), with tan(theta) = sigma / (alpha sigma_data)")
    noise_std: float = option(1.6, "standard deviation of ln tan(theta)", above=0.0)
    max_noise: float = option(0.0, "share of samples at the most noise, whatever that law", minimum=0.0, below=1.0)
    weight: str = option(
        "output", "unit of the loss: the network's output, whatever it predicts, or the paper's F", choices=("output", "F")
    )
    tangent_warmup: int = option(200, "steps over which the tangent's unstable part comes in", minimum=0)
    tangent_floor: float = option(0.1, "c of the tangent's normalisation g / (rms(g) + c)", above=0.0)
    jvp: str = option(
        "forward", "derivative of the student; difference: two passes for one", choices=("forward", "difference")
    )
    jvp_step: float = option(5e-4, "h of the difference, in ln(sigma / alpha); 0.05 smooths time embeddings", above=0.0)
