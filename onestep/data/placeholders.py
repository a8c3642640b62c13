"""A run without its pairs and trajectories, which a teacher takes minutes or hours to make."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ..rng import Rng
from ..teacher import Teacher
from .pairs import PairCache
from .trajectories import GuidedTrajectories, Point


def _made(self: Any, folder: Any, teacher: Teacher, *args: Any, **kwargs: Any) -> None:
    self.teacher = teacher


def _pair(self: Any, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    conditions, z = rng.integers(self.teacher.classes), rng.normal(self.teacher.shape)
    return z, torch.zeros_like(z), conditions


def _point(self: Any, rng: Rng) -> Point:
    z, zeros, conditions = _pair(self, rng)
    t = self.teacher.denoiser.schedule.at(rng.uniform())
    return Point(z, rng.integers(1), t, zeros, rng.uniform(), conditions)


@contextmanager
def placeholders() -> Iterator[None]:
    """Caches of teacher samples are not made inside: what is drawn from them is zeros, in the shapes of the real ones.

    They have `teacher` and `draw`, and nothing else.
    """
    with (
        patch.multiple(PairCache, __init__=_made, draw=_pair),
        patch.multiple(GuidedTrajectories, __init__=_made, draw=_point),
    ):
        yield
