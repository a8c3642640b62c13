"""The options of `onestep.objectives.cd`."""

from dataclasses import dataclass

from ..config import option
from .consistency import ConsistencyConfig


@dataclass
class CDConfig(ConsistencyConfig):
    """Options of consistency distillation."""

    skip: int = option(1, "levels between the two that are compared", minimum=1)
    solver: str = option("ddim", "the teacher's step between them; heun is of second order", choices=("ddim", "heun"))
