"""The options of `onestep.objectives.sid`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .score import ScoreConfig


@dataclass
class SiDConfig(ScoreConfig):
    """Options of SiD. The noise levels are the authors' on EDM, where 0.8 of the schedule is sigma = 24.4."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta2": 0.999}

    alpha: float = option(1.2, "0.5: Fisher divergence; 1: the same at samples held still; 1.2: past it", minimum=0.0)
    t_min: float = option(0.0, "least noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
    t_max: float = option(0.8, "most noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
