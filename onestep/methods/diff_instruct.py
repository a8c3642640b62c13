"""The options of `onestep.objectives.diff_instruct`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .score import ScoreConfig


@dataclass
class DiffInstructConfig(ScoreConfig):
    """Options of Diff-Instruct. `t_min` and `t_max` bound the generator's noise levels under both laws."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta2": 0.999}

    noise: str = option("uniform", "law of the noise levels of both losses", choices=("uniform", "log-normal"))
    noise_mean: float = option(-1.2, "mean of ln(sigma/alpha), if log-normal")
    noise_std: float = option(1.2, "standard deviation of ln(sigma/alpha), if log-normal", above=0.0)
