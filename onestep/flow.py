"""Any schedule's trajectories as those of a rectified flow (Liu et al. 2022, arXiv 2209.03003).

With tau = sigma / (alpha + sigma) and X = x / (alpha + sigma) every x = alpha x_0 + sigma eps lies on the straight line
X = (1 - tau) x_0 + tau eps, and the probability-flow ODE is dX/dtau = eps_hat - x0_hat: a denoiser is a rectified flow's
velocity as it is, tau = 1 being noise. The paper's time is 1 - tau, its velocity x0_hat - eps_hat.
"""

import math

import torch
from torch import Tensor

from .denoiser import Cond
from .schedule import Schedule
from .trajectory import Denoise


def flow_time(schedule: Schedule, tau: Tensor) -> Tensor:
    """The schedule's time at which sigma / (alpha + sigma) is tau in [0, 1], shape (B,); the least noise it has below that.

    Of a schedule with indices it is the nearest one, by ln(sigma / alpha).
    """
    low, _ = schedule.log_range()
    t = schedule.time_at((tau / (1 - tau)).clamp_min(math.exp(low)))
    return t.round().long() if isinstance(schedule.grid(1)[0], int) else t.to(torch.promote_types(tau.dtype, torch.float32))


def flow_velocity(x_t: Tensor, x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """dX/dtau = eps_hat - x0_hat, shape of x_t, from a denoiser's x0 at x_t; sigma_t is not 0."""
    return (x_t - alpha_t * x_0) / sigma_t - x_0


def euler(denoise: Denoise, schedule: Schedule, z: Tensor, cond: Cond, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """`steps` Euler steps of dX/dtau from unit noise z to tau = 0: (X, velocities (steps, B, ...), -d tau (steps,)).

    X is x0 at last. On the times of `Schedule.grid` an Euler step is a DDIM step.
    """
    times = schedule.grid(steps)
    kind = torch.long if isinstance(times[0], int) else torch.promote_types(z.dtype, torch.float32)
    levels = [schedule(torch.full((1,), time, device=z.device, dtype=kind), z) for time in times]
    taus = [sigma / (alpha + sigma) for alpha, sigma in levels]
    x = schedule.init_sigma * z / sum(levels[0])
    velocities, ways = [], []
    for i, (alpha, sigma) in enumerate(levels):
        x_t, t = (alpha + sigma) * x, torch.full((len(z),), times[i], device=z.device, dtype=kind)
        velocities.append(flow_velocity(x_t, denoise(x_t, t, cond), alpha, sigma))
        ways.append(taus[i] - taus[i + 1] if i + 1 < steps else taus[i])
        x = x - ways[i] * velocities[i]
    return x, torch.stack(velocities), torch.cat(ways).flatten()


@torch.no_grad()
def straightness(denoise: Denoise, schedule: Schedule, z: Tensor, cond: Cond, steps: int) -> Tensor:
    """S = int E |v_tau - (X_1 - X_0)|^2 dtau along the trajectories from z, 0 where they are straight (section 2.2).

    A mean over batch and elements, by `steps` Euler steps and as many passes.
    """
    _, velocities, ways = euler(denoise, schedule, z, cond, steps)
    share = (ways / ways.sum()).view(-1, *(1,) * z.ndim)
    mean = (share * velocities).sum(0)
    return (share * (velocities - mean).square()).sum(0).mean()
