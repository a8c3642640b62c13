"""Knowledge distillation of an iterative generative model into one step (Luhman & Luhman 2021, arXiv 2101.02388)."""

from ..methods.kd import KDConfig
from .regression import Regression


class KD(Regression):
    """min_G E 1/2 |G(z) - y(z)|^2, y(z) the sample of the deterministic sampler from z (eq. 10, up to the factor 1/2).

    The minimiser is the sampler's own map, as far as the student can express it. A student of several steps would be
    trained on its first one alone. Raises ValueError for such.
    """

    Config = KDConfig
    one_step = True
