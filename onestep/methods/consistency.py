"""The options of `onestep.objectives.consistency`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class ConsistencyConfig(MethodConfig):
    """Options of every consistency method."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "beta2": 0.999, "clip_norm": 1.0}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # trajectories begin at the schedule's most noise

    levels: int = option(
        40, "noise levels of the trajectories; those of a chain (--student-steps) are among them", minimum=1
    )
    target_ema: float = option(0.0, "decay of the target's moving average; 0: the student itself", minimum=0.0, below=1.0)
    distance: str = option("pseudo-huber", "distance of student and target", choices=("l2", "pseudo-huber"))
    huber: float = option(0.0, "c of the pseudo-Huber distance; 0 means 0.00054 sqrt(dimension)", minimum=0.0)
    weight: str = option(
        "auto", "of a level; auto: signal for epsilon networks, else uniform", choices=("auto", "uniform", "signal", "gap")
    )
