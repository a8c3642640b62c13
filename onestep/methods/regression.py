"""The options of `onestep.objectives.regression`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class RegressionConfig(MethodConfig):
    """Options of the regression. The pairs are made once, kept in the cache folder, and found again by every run."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9}

    distance: str = option(
        "pseudo-huber",
        "distance to the teacher; lpips and dists need packages",
        choices=("l2", "pseudo-huber", "lpips", "dists"),
    )
    huber: float = option(0.0, "c of the pseudo-Huber distance; 0 means 0.00054 sqrt(dimension)", minimum=0.0)
    pairs: int = option(2048, "pairs of noise and teacher sample", minimum=1)
    pair_steps: int = option(50, "teacher steps for each pair", minimum=1)
    pair_sampler: str = option("ddim", "sampler of the pairs; dpm++ needs fewer steps", choices=("ddim", "dpm++"))
    pair_batch: int = option(128, "pairs that the teacher makes at once", minimum=1)
    pair_half: bool = option(False, "keep the pairs in fp16")
