"""PG-SB, the training of SNOOPI (Nguyen et al. 2024, arXiv 2412.02687): SwiftBrush under random guidance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .swiftbrush import SwiftBrush, SwiftBrushConfig


@dataclass
class SnoopiConfig(SwiftBrushConfig):
    """Options of PG-SB; --guidance plays no part in it."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {**SwiftBrushConfig.DEFAULTS, "guidance": 1.0}

    kappa_min: float = option(0.5, "least guidance", minimum=0.0)
    kappa_max: float = option(4.0, "largest guidance", minimum=0.0)
    clip_tau: float = option(0.37, "cosine of picture and prompt above which the CLIP loss is 0")

    def __post_init__(self) -> None:
        if self.kappa_min > self.kappa_max:
            raise ValueError(
                f"kappa_min {self.kappa_min} is above kappa_max {self.kappa_max}; type for example "
                f"--kappa-min {self.kappa_max} --kappa-max {self.kappa_min}"
            )


class Snoopi(SwiftBrush):
    """SwiftBrush with kappa ~ U[kappa_min, kappa_max], one a sample, the same for teacher and critic (eq. 6).

    The gradient is linear in kappa: its expectation is SwiftBrush's at the mean of kappa. What is random adds noise.
    """

    Config = SnoopiConfig

    @classmethod
    def ends_at(cls, config: SnoopiConfig, guidance: float) -> float:
        return super().ends_at(config, (config.kappa_min + config.kappa_max) / 2)

    def span(self) -> tuple[float, float]:
        return self.config.kappa_min, self.config.kappa_max
