"""The options of `onestep.objectives.snoopi`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .swiftbrush import SwiftBrushConfig


@dataclass
class SnoopiConfig(SwiftBrushConfig):
    """Options of PG-SB; --guidance plays no part in it."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {**SwiftBrushConfig.DEFAULTS, "guidance": 1.0}

    kappa_min: float = option(0.5, "least guidance", minimum=0.0)
    kappa_max: float = option(4.0, "largest guidance", minimum=0.0)
    clip_tau: float = option(0.37, "cosine of picture and prompt above which the CLIP loss is 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa_min > self.kappa_max:
            raise ValueError(
                f"kappa_min {self.kappa_min} is above kappa_max {self.kappa_max}; type for example "
                f"--kappa-min {self.kappa_max} --kappa-max {self.kappa_min}"
            )
