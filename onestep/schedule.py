"""Noise schedules as pure functions t -> (alpha_t, sigma_t) with x_t = alpha_t x_0 + sigma_t eps.

The time t is the schedule's own: an integer index for VP, a number in (0, 1] for rectified flow, sigma itself for EDM.
Methods in continuous time also read VP between its indices, where ln(sigma / alpha) is linear in t.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rng import Rng


class Schedule(ABC):
    """What the rest of the library may know of a noise schedule."""

    init_sigma: float
    """Standard deviation of the noise that sampling starts from, at the largest time."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each of shape (B,), float64 (float32 where the device has no float64)."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """What the network is conditioned on at time t, shape (B,)."""

    @abstractmethod
    def at(self, u: Tensor) -> Tensor:
        """The time at fraction u in (0, 1] of the schedule, 1 being pure noise; uniform u is the usual training law."""

    @abstractmethod
    def fraction(self, t: float) -> float:
        """The fraction u of the schedule at which `at` gives the time t."""

    @abstractmethod
    def at_rho(self, rho: float) -> float:
        """The time at which sigma_t / alpha_t is nearest to rho. Raises ValueError where rho is out of reach."""

    @abstractmethod
    def log_range(self) -> tuple[float, float]:
        """(least, most) ln(sigma_t / alpha_t) that networks are called at; of rectified flow one timestep off the ends."""

    @abstractmethod
    def time_at(self, q: Tensor) -> Tensor:
        """The floating-point time at which sigma_t / alpha_t = q, shape (B,); q is cut to the schedule's range.

        Differentiable, forwards too, inside that range; at its very ends a derivative may be zero.
        """

    def __call__(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) shaped (B, 1, ...) to broadcast against `like`, in its precision but at least float32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha_t, sigma_t = self.coefficients(t)
        return alpha_t.to(dtype).view(shape), sigma_t.to(dtype).view(shape)

    def grid(self, steps: int, start: float = 1.0) -> list[float]:
        """`steps` descending times, evenly spaced in u and ending one spacing above zero ("trailing" in diffusers)."""
        u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps * start
        return self.at(u).tolist()

    def chain(self, first: float, steps: int) -> list[float]:
        """Times of a student's `steps` calls, from `first` down; here evenly spaced.

        Raises ValueError where there are not so many times.
        """
        return [first * (steps - k) / steps for k in range(steps)]

    @staticmethod
    def from_scheduler(scheduler: Any) -> "Schedule":
        """The schedule that a diffusers scheduler was configured for. Raises ValueError for kinds not known here."""
        config, name = scheduler.config, type(scheduler).__name__
        if config.get("use_flow_sigmas"):  # solvers for both kinds keep betas in their config all the same
            return RectifiedFlow(shift=config.flow_shift, num_train_timesteps=config.num_train_timesteps)
        if name.startswith("FlowMatch"):
            return RectifiedFlow(shift=config.shift, num_train_timesteps=config.num_train_timesteps)
        if name == "CMStochasticIterativeScheduler":
            return EDM(config.sigma_min, config.sigma_max, config.rho, noise_scale=250.0)
        if name.startswith("EDM"):
            return EDM(config.sigma_min, config.sigma_max, config.rho)
        if "trained_betas" in config:
            return VP(scheduler.alphas_cumprod)
        raise ValueError(
            f"no schedule is known for {name}; allowed are schedulers with betas (DDPM, DDIM, Euler, ...), "
            "FlowMatch*, EDM* and CMStochasticIterativeScheduler: load the pipeline with one of these"
        )


def precise(values: Tensor) -> Tensor:
    """In float64 where the device has it, else in float32."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


class VP(Schedule):
    """Variance preserving: alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]), t in 0 .. N-1.

    DDPM (Ho et al. 2020, eq. 4).
    """

    init_sigma = 1.0
    LEAST = 2.0**-24
    """Of alphas_cumprod between the indices: schedules that end at zero are given what diffusers' Euler gives them."""

    def __init__(self, alphas_cumprod: Tensor):
        self._table = {torch.device("cpu"): alphas_cumprod.detach().to("cpu", torch.float64)}
        self._logs: dict[torch.device, Tensor] = {}
        self.num_train_timesteps = len(alphas_cumprod)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> "VP":
        return cls(torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0))

    @property
    def alphas_cumprod(self) -> Tensor:
        return self._table[torch.device("cpu")]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """By the table for integer t; for floating t with ln(sigma / alpha) between the indices on a straight line."""
        if t.is_floating_point():
            logs = self._log_rho(t.device)
            below = t.floor().long().clamp(0, len(logs) - 2)
            log_rho = logs[below] + (t - below) * (logs[below + 1] - logs[below])
            return (-2 * log_rho).sigmoid().sqrt(), (2 * log_rho).sigmoid().sqrt()
        if t.device not in self._table:  # one copy a device, not one a call
            kind = torch.float32 if t.device.type == "mps" else torch.float64
            self._table[t.device] = self.alphas_cumprod.to(t.device, kind)
        alpha_bar = self._table[t.device][t]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _log_rho(self, device: torch.device) -> Tensor:
        """ln(sigma / alpha) at every index."""
        if device not in self._logs:
            alpha_bar = self.alphas_cumprod.clamp_min(self.LEAST)
            self._logs[device] = precise((((1 - alpha_bar) / alpha_bar).log() / 2).to(device))
        return self._logs[device]

    def log_range(self) -> tuple[float, float]:
        logs = self._log_rho(torch.device("cpu"))
        return float(logs[0]), float(logs[-1])

    def time_at(self, q: Tensor) -> Tensor:
        logs = self._log_rho(q.device)
        log_rho = q.to(logs.dtype).log().clamp(*self.log_range())
        below = (torch.searchsorted(logs, log_rho.detach()) - 1).clamp(0, len(logs) - 2)
        return below + (log_rho - logs[below]) / (logs[below + 1] - logs[below])

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def at(self, u: Tensor) -> Tensor:
        n = self.num_train_timesteps
        # rounding first keeps u = k/n exact: ceil(0.07 * 100) is 8 in floating point
        return ((u.double() * n).mul(1e6).round().div(1e6).ceil().long() - 1).clamp(0, n - 1)

    def chain(self, first: float, steps: int) -> list[float]:
        """From index T - 1 and k steps T - 1, T - 1 - T // k, ...: for T = 1000 and k = 4 the published 999, 749, 499, 249.

        These are what diffusers' LCMScheduler visits with original_inference_steps = k.
        """
        stride = (int(first) + 1) // steps
        if stride == 0:
            raise ValueError(f"student_steps {steps} is more than the {int(first) + 1} noise levels up to init_rho")
        return [int(first) - stride * k for k in range(steps)]

    def fraction(self, t: float) -> float:
        return (t + 1) / self.num_train_timesteps

    def at_rho(self, rho: float) -> float:
        ratio = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        if not ratio[0] * 0.999 <= rho <= ratio[-1] * 1.001:
            raise ValueError(
                f"init_rho {rho} is outside this teacher's schedule; allowed is {ratio[0]:.4f} to {ratio[-1]:.4f}: "
                "type for example --init-rho 2.5"
            )
        return int((ratio - rho).abs().argmin())


class RectifiedFlow(Schedule):
    """alpha_t = 1 - t, sigma_t = t, the network conditioned on 1000 t; `shift` bends u -> t = s u / (1 + (s - 1) u).

    Liu et al. 2022; the shift is Esser et al. 2024, eq. 23.
    """

    init_sigma = 1.0

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000):
        self.shift, self.num_train_timesteps = shift, num_train_timesteps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1 - t, t

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps

    def at(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def fraction(self, t: float) -> float:
        return t / (self.shift - (self.shift - 1) * t)

    def at_rho(self, rho: float) -> float:
        return 1.0 if rho == float("inf") else rho / (1 + rho)

    def log_range(self) -> tuple[float, float]:
        most = math.log(self.num_train_timesteps - 1)
        return -most, most

    def time_at(self, q: Tensor) -> Tensor:
        return 1 / (1 + 1 / q.double())  # finite at both ends


class EDM(Schedule):
    """alpha_t = 1, sigma_t = t; the network is conditioned on noise_scale * ln(sigma), 1/4 in Karras et al. 2022, table 1.

    diffusers' consistency-model scheduler feeds 250 ln(sigma): noise_scale = 250. `at` spaces sigma as in eq. 5.
    """

    CHAIN_RHO = 5.0
    """Of a student's chain: two steps meet at sigma_max / 32 = 2.5, near the data's own size; evenly spaced they would meet
    at 40, where nothing of the picture is left. Karras et al.'s 7 would spend the last of four steps on sigma = .005."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, noise_scale: float = 0.25):
        self.sigma_min, self.sigma_max, self.rho, self.noise_scale = sigma_min, sigma_max, rho, noise_scale
        self.init_sigma = sigma_max

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return torch.ones_like(t), t

    def timestep(self, t: Tensor) -> Tensor:
        return self.noise_scale * t.log()

    def at(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho

    def chain(self, first: float, steps: int) -> list[float]:
        """Karras et al. 2022, eq. 5, with sigma_min = 0: first ((n - k) / n)^rho for k = 0 .. n - 1, rho = `CHAIN_RHO`."""
        return [first * ((steps - k) / steps) ** self.CHAIN_RHO for k in range(steps)]

    def fraction(self, t: float) -> float:
        low, high, here = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max, t))
        return (here - low) / (high - low)

    def at_rho(self, rho: float) -> float:
        if not self.sigma_min <= rho <= self.sigma_max:
            raise ValueError(
                f"init_rho {rho} is outside this teacher's schedule; allowed is {self.sigma_min} to {self.sigma_max}: "
                "type for example --init-rho 2.5"
            )
        return rho

    def log_range(self) -> tuple[float, float]:
        return math.log(self.sigma_min), math.log(self.sigma_max)

    def time_at(self, q: Tensor) -> Tensor:
        return q.double().clamp(self.sigma_min, self.sigma_max)


class LogNormal:
    """Fractions u of a schedule at which ln(sigma/alpha) ~ N(mean, std^2); levels out of reach become the nearest there is.

    EDM's law of sigma (Karras et al. 2022, table 1). On a rectified flow sigma/alpha is t / (1 - t), so that the very same
    law is t's logit-normal one (Esser et al. 2024, eq. 19).
    """

    def __init__(self, schedule: Schedule, mean: float, std: float, device: torch.device | str, nodes: int = 4096):
        """The schedule is inverted by linear interpolation between `nodes` fractions."""
        u = torch.arange(1, nodes + 1, dtype=torch.float64) / nodes
        alpha, sigma = schedule.coefficients(schedule.at(u))
        self.u, self.log_rho = u.float().to(device), (sigma / alpha).log().float().to(device)
        self.mean, self.std = mean, std

    def __call__(self, rng: Rng) -> Tensor:
        wanted = self.mean + self.std * rng.normal(()).to(self.log_rho.dtype)
        above = torch.searchsorted(self.log_rho, wanted).clamp(1, len(self.u) - 1)
        low, high = self.log_rho[above - 1], self.log_rho[above]
        part = ((wanted - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)  # 0/0 where two nodes have the same level
        return self.u[above - 1] + part * (self.u[above] - self.u[above - 1])


class LogNoise:
    """ln(sigma/alpha) ~ N(mean, std^2), cut just inside a schedule's range, where `time_at` has a derivative.

    The law of `LogNormal` for methods in continuous time, which want the level itself and not a fraction of the schedule.
    """

    MARGIN = 1e-6

    def __init__(self, schedule: Schedule, mean: float = 0.0, std: float = 1.0):
        low, high = schedule.log_range()
        self.schedule, self.mean, self.std = schedule, mean, std
        self.low, self.high = low + self.MARGIN, high - self.MARGIN

    def __call__(self, rng: Rng) -> Tensor:
        """(B,), in float64 where the device has it."""
        return self.cut(self.mean + self.std * precise(rng.normal(())))

    def cut(self, log_q: Tensor) -> Tensor:
        return log_q.clamp(self.low, self.high)

    def level(self, time: float) -> float:
        """ln(sigma/alpha) of a time of the schedule, cut likewise."""
        alpha, sigma = self.schedule.coefficients(torch.tensor([time]))
        return min(max(float((sigma / alpha).log()), self.low), self.high)
