"""What a distillation method is to the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config import MethodConfig
from ..generator import Generator
from ..rng import Rng
from ..teacher import Teacher


@dataclass
class Batch:
    """One micro-batch: conditions (class labels, shape (B,)), real samples in x0 units or None, and its random draws."""

    conditions: Tensor
    real: Tensor | None
    rng: Rng


class Objective(ABC):
    """A method: its networks and the order in which they are updated.

    `log` holds detached scalars of the last step for the progress bar; nothing is computed for it alone.
    """

    Config: ClassVar[type[MethodConfig]]
    """Dataclass of the method's own options."""

    def __init__(self, config: Any, teacher: Teacher, generator: Generator, guidance: float, folder: Path):
        """`guidance` is the teacher's while distilling; `folder` is where caches may be kept."""
        self.config, self.teacher, self.generator, self.guidance, self.folder = (
            config,
            teacher,
            generator,
            guidance,
            folder,
        )
        self.log: dict[str, Tensor] = {}

    @classmethod
    def uses_real(cls, config: Any) -> bool:
        """Whether a method with these options looks at real samples."""
        return False

    @abstractmethod
    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        """The trained parties, one optimiser each; every module holds its bare network as `.network`."""

    @abstractmethod
    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yields (player, loss) in the paper's order; the caller runs backward and that player's update, then resumes."""
