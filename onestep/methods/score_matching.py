"""The options of `onestep.objectives.score_matching`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class ScoreMatchingConfig(MethodConfig):
    """Options of teacher score matching. Guidance is left to the method that follows."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "evaluate": False}  # a denoiser, of which one step is a blur
    INSISTS: ClassVar[Mapping[str, Any]] = {"guidance": 1.0}

    t_min: float = option(0.0, "least noise of the samples, as a fraction of the schedule", minimum=0.0)
    t_max: float = option(1.0, "most noise of the samples, as a fraction of the schedule", minimum=0.0)
