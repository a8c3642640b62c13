"""Closed-form denoisers, quadrature and stand-ins for random draws: what the exact tests of the losses are made of."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn

from onestep.denoiser import Cond, Denoiser
from onestep.prediction import PREDICTIONS, EDMPreconditioned, Prediction
from onestep.schedule import EDM, VP, RectifiedFlow, Schedule
from onestep.teacher import Facts, Teacher

SIGMA_DATA = 0.5
TYPES: dict[str, Prediction] = {**PREDICTIONS, "edm": EDMPreconditioned(SIGMA_DATA)}
"""Every prediction type by its name."""


def fixed_level(kind: str) -> tuple[Schedule, float, float]:
    """A schedule whose `at` gives one noise level whatever u in GridRng's sense, with that level's alpha and sigma."""
    if kind == "ve":
        return EDM(1.3, 1.3), 1.0, 1.3
    if kind == "vp":
        return VP(torch.tensor([0.64], dtype=torch.float64)), 0.8, 0.6
    return RectifiedFlow(), 0.65, 0.35  # GridRng's level is u = 0.35


def time_of(schedule: Schedule, timestep: Tensor) -> Tensor:
    """The inverse of Schedule.timestep."""
    if isinstance(schedule, RectifiedFlow):
        return timestep / schedule.num_train_timesteps
    if isinstance(schedule, EDM):
        return (timestep / schedule.noise_scale).exp()
    return timestep


class ClosedForm(nn.Module, ABC):
    """A network with diffusers' call whose output stands for `posterior`, as any prediction type.

    The formulas are written out here once more on purpose: they must not share an error with onestep.prediction.
    """

    def __init__(self, schedule: Schedule, kind: str):
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.inner = nn.Identity()  # a tap whose feature is the network's input

    @abstractmethod
    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 given x_t]."""

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        x = self.inner(x)
        alpha, sigma = (
            c.double().view(-1, *(1,) * (x.ndim - 1)) for c in self.schedule.coefficients(time_of(self.schedule, timestep))
        )
        root = (sigma**2 + SIGMA_DATA**2).sqrt()
        x_t = x * root if self.kind == "edm" else x
        x_0 = self.posterior(x_t, alpha, sigma)
        eps = (x_t - alpha * x_0) / sigma
        if self.kind == "epsilon":
            return (eps,)
        if self.kind == "v_prediction":
            return (alpha * eps - sigma * x_0,)
        if self.kind == "flow_prediction":
            return (eps - x_0,)
        if self.kind == "edm":
            return ((x_0 - (SIGMA_DATA / root) ** 2 * x_t) * root / (sigma * SIGMA_DATA),)
        return (x_0,)


class Gaussian(ClosedForm):
    """x0 ~ N(mean, std^2) for every element; mean and std are parameters."""

    def __init__(self, schedule: Schedule, kind: str = "epsilon", mean: float = 0.7, std: float = 0.9):
        super().__init__(schedule, kind)
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)


class Mixture(ClosedForm):
    """x0 from the mixture .3 N(-1.2, .4^2) + .7 N(.9, .5^2)."""

    def __init__(self, schedule: Schedule, kind: str = "epsilon"):
        super().__init__(schedule, kind)
        self.weights = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
        self.means = nn.Parameter(torch.tensor([-1.2, 0.9], dtype=torch.float64))
        self.stds = nn.Parameter(torch.tensor([0.4, 0.5], dtype=torch.float64))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x, alpha, sigma = x_t[..., None], alpha[..., None], sigma[..., None]
        variance = alpha**2 * self.stds**2 + sigma**2
        log = self.weights.log() - 0.5 * variance.log() - 0.5 * (x - alpha * self.means) ** 2 / variance
        each = self.means + alpha * self.stds**2 / variance * (x - alpha * self.means)
        return (log.softmax(-1) * each).sum(-1)


class Affine(ClosedForm):
    """x0 = gain x_t + bias, both free: what a fake denoiser at one noise level has to learn for a Gaussian."""

    def __init__(self, schedule: Schedule, kind: str):
        super().__init__(schedule, kind)
        self.gain = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.gain * x_t + self.bias


def denoiser(network: ClosedForm) -> Denoiser:
    return Denoiser(network, network.schedule, TYPES[network.kind], taps=["inner"])


def grid(nodes: int, dimensions: int) -> tuple[list[Tensor], Tensor]:
    """Gauss-Hermite product grid for independent N(0, 1): `dimensions` coordinates of shape (n, 1), weights (n, 1)."""
    points, weights = hermegauss(nodes)
    weights = weights / weights.sum()
    axes = [torch.tensor(c.reshape(-1, 1)) for c in np.meshgrid(*[points] * dimensions, indexing="ij")]
    product = np.prod(np.meshgrid(*[weights] * dimensions, indexing="ij"), axis=0)
    return axes, torch.tensor(product.reshape(-1, 1))


class GridRng:
    """Rng's interface with the given normal draws, in order; u is `level` of its range, integers are `shared`."""

    def __init__(self, normals: Sequence[Tensor], level: float = 0.35, shared: int = 0):
        self.normals, self.level, self.shared, self.rows = list(normals), level, shared, len(normals[0])

    def normal(self, shape: Sequence[int]) -> Tensor:
        draw = self.normals.pop(0)
        assert draw.shape[1:] == torch.Size(shape)
        return draw

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.full((self.rows,), self.level, dtype=torch.float64)

    def shared_integer(self, high: int) -> int:
        assert self.shared < high
        return self.shared


class ClosedFormTeacher(Teacher):
    """A closed-form network as a teacher; everything not overridden is the real Teacher."""

    network_name, export_scale = "network", "unit"

    def __init__(self, network: ClosedForm, shape: tuple[int, ...] = (1,)):
        self.facts, self._shape = Facts(source="closed form"), shape
        self.denoiser = denoiser(network.eval().requires_grad_(False))

    def copy(self, player: str = "critic") -> Denoiser:
        return denoiser(copy.deepcopy(self.denoiser.network).requires_grad_(True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def image_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    native_resolution = pixels_per_cell = 1

    @property
    def classes(self) -> int:
        return 3

    def taps(self, network: nn.Module) -> list[str]:
        return ["inner"]

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        return {"class_labels": conditions}, {"class_labels": torch.full_like(conditions, 3)}

    def to_x0(self, images: Tensor) -> Tensor:
        return images

    schedules = Schedule

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0


class Calls:
    """Counts the samples that enter a network (`started`) and those that come out of it (`finished`)."""

    def __init__(self, network: nn.Module):
        self.started = self.finished = self.passes = 0
        network.register_forward_pre_hook(self._enter)
        network.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.started += len(args[0])
        self.passes += 1

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self.finished += len(args[0])

    @property
    def stopped(self) -> int:
        return self.started - self.finished
