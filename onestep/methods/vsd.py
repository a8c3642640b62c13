"""The options of `onestep.objectives.vsd`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .score import ScoreConfig


@dataclass
class VSDConfig(ScoreConfig):
    """Options of VSD."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"critic": "lora"}
