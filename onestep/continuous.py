"""Trajectories in continuous time, in coordinates where their slope is finite at every noise level of every schedule.

x = x_t / size for a size of the coordinates' own; levels are given as ln q = ln(sigma / alpha), shape (B,), and a denoiser
of any prediction type becomes the slope dx/dtime of its probability-flow ODE. All of it can be differentiated forwards.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .denoiser import Cond
from .prediction import Prediction
from .schedule import Schedule
from .trajectory import Denoise


class Path(ABC):
    """Coordinates on a schedule."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    @abstractmethod
    def parts(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(keep, way, size) with x_t = size x and slope (keep x - x0) / way."""

    def velocity(self, denoise: Denoise, x: Tensor, log_q: Tensor, cond: Cond) -> Tensor:
        """(keep x - x0) / way, shape of x: the slope for a denoiser, and keep x - way velocity is always its x0."""
        t = self.schedule.time_at(log_q.exp())
        keep, way, size = self.parts(*self.schedule(t, x))
        return (keep * x - denoise(size * x, t, cond)) / way

    def per_output(self, prediction: Prediction, log_q: Tensor, like: Tensor) -> Tensor:
        """|d velocity / d output| of a network of that prediction type, shape (B, 1, ...)."""
        alpha, sigma = self.schedule(self.schedule.time_at(log_q.exp()), like)
        _, way, _ = self.parts(alpha, sigma)
        return prediction.to_x0(torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma).abs() / way


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

    def angles(self, log_q: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos(theta), sin(theta)), shaped to broadcast against `like`."""
        cos, sin, _ = self.parts(*self.schedule(self.schedule.time_at(log_q.exp()), like))
        return cos, sin


class StraightFlow(Path):
    """x = (1 - t) x_0 + t eps with t = sigma / (alpha + sigma), slope dx/dt = eps_hat - x0 = (x - x0) / t.

    The size is alpha + sigma, and ln q = ln(t / (1 - t)) (rectified flow, Liu et al. 2022).
    """

    def parts(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(alpha), sigma / (alpha + sigma), alpha + sigma

    def time(self, log_q: Tensor, like: Tensor) -> Tensor:
        """t, shaped to broadcast against `like`."""
        return self.parts(*self.schedule(self.schedule.time_at(log_q.exp()), like))[1]
