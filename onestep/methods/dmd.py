"""The options of `onestep.objectives.dmd`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .regression import RegressionConfig
from .score import ScoreConfig


@dataclass
class DMDConfig(RegressionConfig, ScoreConfig):
    """Options of DMD: those of the score methods, those of the regression, and the weight between them."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    regression: float = option(0.25, "weight of the regression on teacher pairs; 0 makes no pairs", minimum=0.0)
