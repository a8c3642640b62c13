"""The options of `onestep.objectives.instaflow`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .regression import RegressionConfig


@dataclass
class InstaFlowConfig(RegressionConfig):
    """Options of InstaFlow: those of the regression, which is its last stage, and of the rounds of reflow before it."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "beta2": 0.999, "clip_norm": 1.0}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # a flow begins at the most noise

    distance: str = option(
        "l2", "distance to the teacher; lpips and dists need packages", choices=("l2", "pseudo-huber", "lpips", "dists")
    )
    pair_steps: int = option(25, "steps for each pair, of the teacher and of the rectified student", minimum=1)
    rounds: int = option(1, "rounds of reflow before the distillation; 0 distils the teacher itself", minimum=0)
    reflow_steps: int = option(600, "training steps of each round", minimum=1)
    reflow_ema: float = option(0.99, "decay of the student's average that makes the next pairs", minimum=0.0, below=1.0)
