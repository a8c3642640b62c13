"""Trajectories in continuous time, in coordinates where their slope is finite at every noise level of every schedule.

x = x_t / size for a size of the coordinates' own; levels are given as ln q = ln(sigma / alpha), shape (B,), and a denoiser
of any prediction type becomes the slope dx/dtime of its probability-flow ODE. All of it can be differentiated forwards.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Cond
from .prediction import Prediction
from .schedule import Schedule
from .trajectory import Denoise


class Level(NamedTuple):
    """What coordinates need of a noise level: time, shape (B,), and the rest shaped to broadcast against samples."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    keep: Tensor
    way: Tensor
    size: Tensor


class Path(ABC):
    """Coordinates on a schedule."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    @abstractmethod
    def parts(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(keep, way, size) with x_t = size x and slope (keep x - x0) / way."""

    def at(self, log_q: Tensor, like: Tensor) -> Level:
        """Everything of the levels ln q, to be used for several passes at them."""
        t = self.schedule.time_at(log_q.exp())
        alpha, sigma = self.schedule(t, like)
        return Level(t, alpha, sigma, *self.parts(alpha, sigma))

    def velocity(self, denoise: Denoise, x: Tensor, at: Tensor | Level, cond: Cond) -> Tensor:
        """(keep x - x0) / way, shape of x: the slope for a denoiser, and keep x - way velocity is always its x0.

        `at` is ln q, or what `at` made of it.
        """
        level = at if isinstance(at, Level) else self.at(at, x)
        return (level.keep * x - denoise(level.size * x, level.t, cond)) / level.way

    def per_output(self, prediction: Prediction, level: Level) -> Tensor:
        """|d velocity / d output| of a network of that prediction type, shape (B, 1, ...)."""
        one, zero = torch.ones_like(level.alpha), torch.zeros_like(level.alpha)
        return prediction.to_x0(one, zero, level.alpha, level.sigma).abs() / level.way


class TrigFlow(Path):
    """x = cos(theta) x_0 + sin(theta) z, z ~ N(0, sigma_data^2), slope dx/dtheta = (cos(theta) x - x0) / sin(theta).

    tan(theta) = q / sigma_data and size = sqrt(alpha^2 + sigma^2 / sigma_data^2) (Lu & Song 2024, arXiv 2410.11081, section
    3.1; for other schedules SANA-Sprint, Chen et al. 2025, arXiv 2503.09641, section 3.1).
    """

    def __init__(self, schedule: Schedule, sigma_data: float):
        super().__init__(schedule)
        self.sigma_data = sigma_data

    def parts(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = sigma / self.sigma_data
        size = (alpha**2 + z**2).sqrt()
        return alpha / size, z / size, size


class StraightFlow(Path):
    """x = (1 - t) x_0 + t eps with t = sigma / (alpha + sigma), slope dx/dt = eps_hat - x0 = (x - x0) / t.

    The size is alpha + sigma, and ln q = ln(t / (1 - t)) (rectified flow, Liu et al. 2022).
    """

    def parts(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(alpha), sigma / (alpha + sigma), alpha + sigma
