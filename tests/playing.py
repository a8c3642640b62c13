"""Objectives on tiny or closed-form teachers, and single steps of them as the trainer takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import dit_pipeline
from torch import Tensor, nn

from onestep.generator import Generator, steps_from
from onestep.objectives.base import Batch, Objective
from onestep.rng import Rng
from onestep.schedule import VP
from onestep.teacher import DiTTeacher, Facts, Teacher

LEVELS = ("ve", "vp", "flow")
M, S, MU, TAU = 0.7, 0.9, -0.4, 0.6  # teacher N(M, S^2), student MU + TAU z


def linear_vp() -> VP:
    return VP.from_betas(torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64))


def objective(
    kind: type[Objective],
    teacher: Teacher,
    folder: Path = Path("unused"),
    guidance: float = 1.0,
    times: Sequence[float] | None = None,
    **options: Any,
) -> Any:
    """The method on a student that starts as the teacher; by default a one-step one from sigma/alpha = 2.5."""
    times = steps_from(teacher.denoiser.schedule, 2.5, 1) if times is None else times
    config = kind.Config(**options)
    generator = kind.student(config, teacher, len(times)) or Generator(teacher.copy("student"), times)
    kind.prepare(config, generator)
    return kind(config, teacher, generator, guidance, folder, folder)


def dit() -> Teacher:
    return DiTTeacher(dit_pipeline(), Facts("x"))


def batch(teacher: Teacher, step: int = 0, size: int = 2, real: bool = True) -> Batch:
    source = torch.Generator().manual_seed(100 + step)
    images = torch.randn(size, *teacher.shape, generator=source) if real else None
    return Batch(torch.arange(size) % 3, images, Rng(11, step, size))


def play(method: Objective, step: int, item: Batch) -> list[str]:
    """One step as the trainer takes it: backward inside the loop; returns who was updated."""
    order = []
    for player, loss in method.step(item, step):
        loss.backward()
        order.append(player)
    return order


def has_gradient(module: nn.Module) -> list[bool]:
    return [p.grad is not None for p in module.parameters()]


def clear(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


def zeros(count: int) -> Tensor:
    """Conditions of `count` samples of the first class."""
    return torch.zeros(count, dtype=torch.long)
