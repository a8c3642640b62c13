"""Knowledge distillation of an iterative generative model into one step (Luhman & Luhman 2021, arXiv 2101.02388)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .regression import Regression, RegressionConfig


@dataclass
class KDConfig(RegressionConfig):
    """Options of knowledge distillation: those of the regression, with the paper's squared error."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "beta2": 0.999}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # the teacher's sampler begins at the most noise

    distance: str = option(
        "l2", "distance to the teacher; lpips and dists need packages", choices=("l2", "pseudo-huber", "lpips", "dists")
    )


class KD(Regression):
    """min_G E 1/2 |G(z) - y(z)|^2, y(z) the sample of the deterministic sampler from z (eq. 10, up to the factor 1/2).

    The minimiser is the sampler's own map, as far as the student can express it. A student of several steps would be
    trained on its first one alone. Raises ValueError for such.
    """

    Config = KDConfig
    one_step = True
