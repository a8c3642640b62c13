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

    def __init__(self, config: Any, teacher: Teacher, generator: Generator, guidance: float, folder: Path, run: Path):
        """`guidance` is the teacher's while distilling. Caches that runs share are kept in `folder`, all else in `run`."""
        self.config, self.teacher, self.generator, self.guidance = config, teacher, generator, guidance
        self.folder, self.run = folder, run
        self.log: dict[str, Tensor] = {}

    @classmethod
    def student(cls, config: Any, teacher: Teacher, steps: int) -> Generator | None:
        """A student of the method's own, of so many network calls a sample; None: a copy of the teacher."""
        return None

    @classmethod
    def prepare(cls, config: Any, generator: Generator) -> None:
        """Change the student's network before anything is made of it, where a method trains inputs that it lacks."""
        return None

    @classmethod
    def uses_real(cls, config: Any) -> bool:
        """Whether a method with these options looks at real samples."""
        return False

    @classmethod
    def ends_at(cls, config: Any, guidance: float) -> float:
        """Guidance of the teacher that the student ends at, with these options and `guidance` asked for."""
        return guidance

    settled: int = 0
    """The first step from which on all players take their turns, and the target is the final one."""

    def kept(self) -> Sequence[nn.Module]:
        """Networks it holds in memory beside the teacher and the players."""
        return ()

    def state(self) -> Mapping[str, nn.Module]:
        """Networks that change in training but are no player's: checkpoints hold them, so that a run resumes exactly."""
        return {}

    def updated(self, player: str) -> None:
        """Called after each optimiser step of a player, such as for a moving average of it."""
        return None

    @abstractmethod
    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        """The trained parties, one optimiser each; every module holds its bare network as `.network`."""

    @abstractmethod
    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yields (player, loss) in the paper's order; the caller runs backward and that player's update, then resumes."""
