"""The options of `onestep.objectives.sim`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .score import ScoreConfig


@dataclass
class SIMConfig(ScoreConfig):
    """Options of SIM. The noise levels are SiD's on EDM, where 0.8 of the schedule is sigma = 24.4."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta2": 0.999}

    distance: str = option("pseudo-huber", "distance between the two denoisers", choices=("pseudo-huber", "squared-l2"))
    huber_c: float = option(0.0, "c of the pseudo-Huber distance; 0 means 0.00054 sqrt(dimension)", minimum=0.0)
    t_min: float = option(0.0, "least noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
    t_max: float = option(0.8, "most noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
