"""PG-SB, the training of SNOOPI (Nguyen et al. 2024, arXiv 2412.02687): SwiftBrush under random guidance."""

from ..methods.snoopi import SnoopiConfig
from .swiftbrush import SwiftBrush


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
