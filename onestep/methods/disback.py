"""The options of `onestep.objectives.disback`."""

from dataclasses import dataclass

from ..config import option
from .score import ScoreConfig


@dataclass
class DisBackConfig(ScoreConfig):
    """Options of DisBack: backtracking, which every score distillation method has, is on by default."""

    backtrack: int = option(200, "steps that first record the teacher's way to the student; 0 is off", minimum=0)
