"""The options of `onestep.objectives.hipa`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .regression import RegressionConfig


@dataclass
class HiPAConfig(RegressionConfig):
    """Options of HiPA: those of the regression, whose distance is one of pictures here, and its high-frequency terms."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "student": "lora",
        "rank": 16,
        "targets": "to_q,to_k,to_v,to_out.0",
        "beta1": 0.9,
        "beta2": 0.999,
    }
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # the teacher's sampler begins at the most noise

    fourier: float = option(0.1, "weight of the high-passed pictures' distance; 0 is off", minimum=0.0)
    edge: float = option(0.001, "weight of the distance of Sobel edges; 0 is off", minimum=0.0)
    cutoff: float = option(0.125, "least high frequency, in cycles a pixel; 0.5 is the highest", above=0.0, below=0.5)
    mask: str = option("gaussian", "how the high pass begins", choices=("gaussian", "hard"))
