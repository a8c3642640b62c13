"""The options of `onestep.objectives.hyper_sd_score`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .hyper_sd import HyperSDConfig
from .score import ScoreConfig


@dataclass
class HyperSDScoreConfig(HyperSDConfig, ScoreConfig):
    """Options of the one-step stage. Weights are relative to losses that are means over batch and elements."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    matching: float = option(1.0, "weight of the distribution matching loss", minimum=0.0)
    anchor: float = option(0.25, "weight of the regression on the student that this run starts from", minimum=0.0)
    anchor_steps: int = option(
        1, "jumps of that student for what is regressed on; more need its segment_end network", minimum=1
    )
    mix: int = option(0, "every how many steps one is TSCD's, which keeps the student's jumps; 0 is never", minimum=0)
    reward: str | None = option(None, "rewards to raise, separated by commas: clip, or package.module:Class; none is off")
    reward_weight: float = option(0.1, "weight of the rewards' loss", minimum=0.0)
