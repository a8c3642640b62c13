"""What the exact tests of consistency methods are made of: a schedule, a student that is a table, and two-valued noise."""

from collections.abc import Sequence
from typing import Any

import torch
from gaussian import ClosedForm, ClosedFormTeacher
from guided import Classes
from playing import objective
from torch import Tensor, nn

from onestep.objectives import Batch
from onestep.schedule import RectifiedFlow, Schedule
from onestep.trajectory import Grid

MEANS, S, TOP = (-1.0, 0.5, 1.3, 0.2), 0.7, 0.95
"""Classes 0, 1, 2 and the null one, N(mean, S^2); the last time of a cosine schedule."""
SIGNS = [torch.tensor(each, dtype=torch.float64).view(-1, 1) for each in ([1, 1, -1, -1], [1, -1, 1, -1])]
"""Two independent signs in four rows: their means, squares and products are those of two standard normal draws."""


def fits(name: str, kind: str) -> bool:
    """Whether a schedule and a prediction go together: EDM's preconditioning is for alpha 1, and epsilon needs a signal."""
    return (kind == "edm") == (name == "edm") and (kind != "epsilon" or name in ("vp", "edm"))


class Cosine(RectifiedFlow):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in (0, 1]."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.pi / 2 * t.double()
        return angle.cos(), angle.sin()


class Table(ClosedForm):
    """x0 = slope[n] x_t + bias[n] at the n-th level of a grid: it can be every affine function of each level."""

    def __init__(self, grid: Grid, kind: str):
        super().__init__(grid.schedule, kind)
        self.grid = grid
        self.slope = nn.Parameter(torch.full((grid.size + 1,), 0.3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.full((grid.size + 1,), -0.2, dtype=torch.float64))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        away = (alpha * self.grid.sigma - sigma * self.grid.alpha).abs()
        n = away.min(1).indices
        assert float(away.min(1).values.max()) < 1e-6, "no level of the grid"
        return self.slope[n, None] * x_t + self.bias[n, None]


class Exact(Classes):
    """The consistency function of each class: x0 = m + S / sqrt(v) (x_t - alpha m), v = alpha^2 S^2 + sigma^2."""

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean = self.means[self.labels[-1]].view(-1, *(1,) * (x_t.ndim - 1))
        return mean + self.std / (alpha**2 * self.std**2 + sigma**2).sqrt() * (x_t - alpha * mean)


class Coins:
    """Rng's interface: integers are `level` for all rows, normal draws the given ones in order, then zeros."""

    def __init__(self, level: int | Tensor, normals: Sequence[Tensor], uniform: Tensor | None = None):
        self.level, self.normals, self.fractions = level, list(normals), uniform
        self.rows = len(normals[0])

    def integers(self, high: int) -> Tensor:
        level = torch.as_tensor(self.level).expand(self.rows)
        assert int(level.max()) < high
        return level

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self.normals.pop(0) if self.normals else torch.zeros(self.rows, *shape, dtype=torch.float64)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        u = torch.full((self.rows,), 0.5, dtype=torch.float64) if self.fractions is None else self.fractions
        return low + (high - low) * u


def made(
    method: Any,
    levels: int,
    schedule: Schedule | None = None,
    kind: str = "v_prediction",
    guidance: float = 1.0,
    **options: Any,
) -> Any:
    """The method on Gaussian classes, its student a table of its levels; by default a cosine schedule up to TOP."""
    schedule, times = (Cosine(), [TOP]) if schedule is None else (schedule, [schedule.grid(1)[0]])
    teacher = ClosedFormTeacher(Classes(schedule, kind, MEANS, S))
    play = objective(method, teacher, guidance=guidance, times=times, levels=levels, **{"distance": "l2", **options})
    play.generator.denoiser.network = Table(play.grid, kind)
    return play


def item(level: int | Tensor, label: int = 2, normals: Sequence[Tensor] = (), uniform: Tensor | None = None) -> Batch:
    """Samples of a class at one of the student's levels, counted from 0: the data's sign, then the noise's."""
    data, noise = SIGNS
    rng: Any = Coins(level, [noise, *normals], uniform)
    return Batch(torch.full((4,), label), MEANS[label] + S * data, rng)


def settle(play: Any, level: int, *sources: Batch) -> None:
    """One exact Newton step on slope and bias of the student's level, 1 and up, over the mean loss of `sources`.

    The loss is the level's weight times E (slope x + bias - target)^2: its Hessian is 2 [[E x^2, E x], [E x, 1]].
    """
    table = play.generator.denoiser.network
    table.zero_grad(set_to_none=True)
    for source in sources:
        ((_, loss),) = play.step(source, 0)
        (loss / len(sources)).backward()
    n = play.parts * level
    alpha, sigma = play.grid.alpha[n], play.grid.sigma[n]
    mean = alpha * sources[0].real.mean()
    square = mean**2 + (alpha * S) ** 2 + sigma**2
    hessian = 2 * torch.stack([torch.stack([square, mean]), torch.stack([mean, torch.ones_like(mean)])])
    gradient = torch.stack([table.slope.grad[n], table.bias.grad[n]]) / play.weights[level - 1]
    others = [i for i in range(len(table.slope)) if i != n]
    assert not bool(table.slope.grad[others].any()), "a gradient reaches the target"
    with torch.no_grad():
        step = torch.linalg.solve(hessian, gradient)
        table.slope[n] -= step[0]
        table.bias[n] -= step[1]


def trained(play: Any, label: int = 2, uniforms: Sequence[Tensor | None] = (None,)) -> tuple[float, float]:
    """(slope in y = x / alpha, bias) of the last level, each level fitted once those below it are."""
    for level in range(1, len(play.weights) + 1):
        settle(play, level, *(item(level - 1, label, uniform=each) for each in uniforms))
    table = play.generator.denoiser.network
    return float(table.slope[-1].detach() * play.grid.alpha[-1]), float(table.bias[-1].detach())
