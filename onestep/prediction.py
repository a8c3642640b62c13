"""What a network predicts, and how that becomes x0 and back.

`x_t = alpha_t x_0 + sigma_t eps`; every conversion runs in the precision of its arguments, float32 at least.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from .schedule import Schedule


class Prediction(ABC):
    """One prediction type. `target` and `to_x0` are inverse: to_x0(target(x0, eps)) = x0."""

    name: str

    def scale_input(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """The network's input for the noised sample x_t."""
        return x_t

    @abstractmethod
    def to_x0(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """The x0 that a network output stands for."""

    @abstractmethod
    def target(self, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """The output that a network is regressed on for a sample x_0 and its noise eps."""

    def weight(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor | float:
        """Weight of the squared error on `output` in denoising score matching."""
        return 1.0


class Epsilon(Prediction):
    """output = eps; x0 = (x_t - sigma output) / alpha."""

    name = "epsilon"

    def to_x0(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (x_t - sigma_t * output) / alpha_t

    def target(self, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return eps


class Velocity(Prediction):
    """output = alpha eps - sigma x0 (Salimans & Ho 2022); x0 = (alpha x_t - sigma output) / (alpha^2 + sigma^2)."""

    name = "v_prediction"

    def to_x0(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (alpha_t * x_t - sigma_t * output) / (alpha_t**2 + sigma_t**2)

    def target(self, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return alpha_t * eps - sigma_t * x_0


class Sample(Prediction):
    """output = x0; its squared error is weighted by alpha^2 / sigma^2, which makes it the epsilon loss."""

    name = "sample"

    def to_x0(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return output

    def target(self, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return x_0

    def weight(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor | float:
        return alpha_t**2 / sigma_t**2


class Flow(Prediction):
    """output = eps - x0 (rectified flow); x0 = (x_t - sigma output) / (alpha + sigma), i.e. x_t - t output on the line."""

    name = "flow_prediction"

    def to_x0(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (x_t - sigma_t * output) / (alpha_t + sigma_t)

    def target(self, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return eps - x_0


class EDMPreconditioned(Prediction):
    """x0 = c_skip x_t + c_out F(c_in x_t) with Karras et al. 2022, table 1, for alpha_t = 1.

    c_skip = sd^2 / (sigma^2 + sd^2), c_out = sigma sd / sqrt(sigma^2 + sd^2), c_in = 1 / sqrt(sigma^2 + sd^2).
    The paper's loss weight is 1 / c_out^2, so its loss is the plain mean square on the network's output F.
    """

    name = "edm"

    def __init__(self, sigma_data: float = 0.5):
        self.sigma_data = sigma_data

    def scale_input(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return x_t / (sigma_t**2 + self.sigma_data**2).sqrt()

    def to_x0(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        total = sigma_t**2 + self.sigma_data**2
        return self.sigma_data**2 / total * x_t + sigma_t * self.sigma_data / total.sqrt() * output

    def target(self, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        total = sigma_t**2 + self.sigma_data**2
        x_t = alpha_t * x_0 + sigma_t * eps
        return (x_0 - self.sigma_data**2 / total * x_t) * total.sqrt() / (sigma_t * self.sigma_data)


PREDICTIONS: dict[str, Prediction] = {p.name: p for p in (Epsilon(), Velocity(), Sample(), Flow())}


def prediction_of(scheduler: Any) -> Prediction:
    """The prediction type that a diffusers scheduler's config names. Raises ValueError for an unknown one."""
    if "sigma_data" in scheduler.config:
        return EDMPreconditioned(scheduler.config.sigma_data)
    if type(scheduler).__name__.startswith("FlowMatch"):
        return PREDICTIONS["flow_prediction"]
    name = scheduler.config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise ValueError(f"unknown prediction_type {name!r} in the scheduler's config; allowed are {sorted(PREDICTIONS)}")
    return PREDICTIONS[name]


def add_noise(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps."""
    alpha_t, sigma_t = schedule(t, x_0)
    return alpha_t * x_0 + sigma_t * eps
