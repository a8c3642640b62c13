"""A teacher of Gaussian classes in closed form, and random draws that a test chooses."""

from collections.abc import Sequence
from typing import Any

import torch
from gaussian import ClosedForm, GridRng
from torch import Tensor, nn

from onestep.schedule import EDM, VP, RectifiedFlow, Schedule


class Classes(ClosedForm):
    """x0 ~ N(means[class], std^2); the last class is the null one, with as much variance as the others."""

    def __init__(
        self, schedule: Schedule, kind: str = "epsilon", means: Sequence[float] = (-1, 0.5, 2, 0.5), std: float = 0.7
    ):
        super().__init__(schedule, kind)
        self.means = nn.Parameter(torch.tensor(means, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        self.labels.append(cond["class_labels"])
        return super().forward(x, timestep, return_dict)

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean = self.means[self.labels[-1]].view(-1, *(1,) * (x_t.ndim - 1))
        return mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x_t - alpha * mean)


class Draws(GridRng):
    """GridRng whose uniform draws keep to their range: low + u (high - low), u by `fractions` in order, then at `level`."""

    def __init__(self, normals: Sequence[Tensor], fractions: Sequence[Any] = (), level: float = 0.35):
        super().__init__(normals, level)
        self.fractions = list(fractions)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        u = self.fractions.pop(0) if self.fractions else self.level
        return low + (high - low) * torch.as_tensor(u, dtype=torch.float64).expand(self.rows)


def at_ratio(level: str, rho: float) -> tuple[Schedule, float, float, float]:
    """A schedule at sigma / alpha = rho whatever u, or in a flow at the u that comes last; its alpha and sigma."""
    if level == "ve":
        return EDM(rho, rho), 1.0, rho, 0.5
    if level == "vp":
        alpha_bar = 1 / (1 + rho**2)
        return VP(torch.tensor([alpha_bar], dtype=torch.float64)), alpha_bar**0.5, rho * alpha_bar**0.5, 0.5
    return RectifiedFlow(), 1 / (1 + rho), rho / (1 + rho), rho / (1 + rho)
