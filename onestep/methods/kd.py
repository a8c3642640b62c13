"""The options of `onestep.objectives.kd`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .regression import RegressionConfig


@dataclass
class KDConfig(RegressionConfig):
    """Options of knowledge distillation: those of the regression, with the paper's squared error."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "beta2": 0.999}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # the teacher's sampler begins at the most noise

    distance: str = option(
        "l2", "distance to the teacher; lpips and dists need packages", choices=("l2", "pseudo-huber", "lpips", "dists")
    )
