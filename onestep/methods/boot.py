"""The options of `onestep.objectives.boot`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class BOOTConfig(MethodConfig):
    """Options of BOOT."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "beta2": 0.999}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # the teacher's trajectory begins at the most noise

    levels: int = option(50, "steps of the teacher's trajectory, 1 / delta", minimum=1)
    anneal: int = option(0, "training steps with delta 4, then 2 times as large; 0 is off", minimum=0)
    boundary: float = option(1.0, "weight beta of the boundary loss", minimum=0.0)
    boundary_steps: int = option(0, "training steps with the boundary loss alone", minimum=0)
    weight: str = option("slope", "omega_t: 1 / lambda'^2, or the same for all levels", choices=("slope", "uniform"))
    most: float = option(100.0, "largest weight of a level, with slope", above=0.0)
    solver: str = option("ddim", "the teacher's step; heun asks it twice", choices=("ddim", "heun"))
