"""Trajectories of a teacher: a grid of noise levels, and the first-order step that every solver on it is made of.

With q = sigma / alpha and y = x / alpha, the probability-flow ODE is dy/dq = eps_hat (Song et al. 2021, DDIM, eq. 14).
"""

import copy
from collections.abc import Callable, Sequence, Set

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import Cond
from .prediction import Prediction
from .schedule import Schedule

Levels = tuple[Tensor, Tensor]
"""(alpha, sigma) of a batch, each of shape (B, 1, ...)."""

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x_t, t, cond) -> x0, such as a Denoiser or a guided teacher."""


class Grid:
    """Noise levels 0 .. size on the way from clean data to noise; batches of them are integers, shape (B,).

    Level n >= 1 is the schedule's time at n / size of the way up to `top`; level 0 is the sample itself, alpha = 1 and
    sigma = 0, so that what is consistent along a trajectory is x0 there.
    """

    def __init__(
        self,
        schedule: Schedule,
        size: int,
        top: float | None = None,
        device: torch.device | str = "cpu",
        through: Sequence[float] = (),
    ):
        """`top` is the schedule's time of the last level, by default its end. The level nearest to each of the times
        `through`, such as those of a few-step generator, is moved there. Raises ValueError where levels coincide."""
        start = 1.0 if top is None else schedule.fraction(top)
        times = schedule.grid(size, start)[::-1]
        for time in through:
            times[min(range(size), key=lambda n: abs(times[n] - time))] = time
        self.schedule = schedule
        self._fill(times, set(through), device)

    def _fill(self, times: Sequence[float], through: Set[float], device: torch.device | str) -> None:
        self.size = len(times)
        if len(set(times)) < self.size or sorted(times) != list(times):
            raise ValueError(f"{self.size} noise levels are more than this schedule has up to {times[-1]}; type fewer")
        if not through <= set(times):
            raise ValueError(
                f"{self.size} noise levels are fewer than it takes to hold the times {sorted(through)}; type more"
            )
        kind = torch.long if isinstance(times[0], int) else torch.float64
        self.times = torch.tensor([times[0], *times], dtype=kind).to(device)
        """By level, shape (size + 1,); that of level 0 is a stand-in which networks may be called at."""
        alpha, sigma = (each.clone() for each in self.schedule.coefficients(self.times))  # which may be the times
        alpha[0], sigma[0] = 1.0, 0.0
        self.alpha, self.sigma = alpha, sigma

    def finer(self, parts: int) -> "Grid":
        """The grid with parts - 1 more levels below each of this one's, evenly spaced in the schedule's fraction.

        Level n is level parts * n there. Raises ValueError where levels coincide.
        """
        known = self.times[1:].tolist()
        u = [0.0, *(self.schedule.fraction(time) for time in known)]
        part = torch.arange(1, parts, dtype=torch.float64) / parts
        times: list[float] = []
        for low, high, time in zip(u, u[1:], known):
            times += [*self.schedule.at(low + (high - low) * part).tolist(), time]
        grid = copy.copy(self)
        grid._fill(times, set(), self.times.device)
        return grid

    def time(self, level: Tensor, like: Tensor | None = None) -> Tensor:
        """The schedule's time, shape (B,); float64 where it is no index, or in the precision of `like`, float32 at least."""
        t = self.times[level]
        return t if like is None or not t.is_floating_point() else t.to(torch.promote_types(like.dtype, torch.float32))

    def levels(self, level: Tensor, like: Tensor) -> Levels:
        """(alpha, sigma), shaped to broadcast against `like`, in its precision but at least float32."""
        kind, shape = torch.promote_types(like.dtype, torch.float32), (-1, *(1,) * (like.ndim - 1))
        return self.alpha[level].to(kind).view(shape), self.sigma[level].to(kind).view(shape)

    def noised(self, x_0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """x = alpha x_0 + sigma eps."""
        alpha, sigma = self.levels(level, x_0)
        return alpha * x_0 + sigma * eps

    def consistency(self, denoiser: Denoise, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        """f(x, level): the denoiser's x0, and x itself at level 0, which is the boundary condition."""
        x_0 = denoiser(x, self.time(level, x), cond)
        return torch.where((level == 0).view(-1, *(1,) * (x.ndim - 1)), x.to(x_0.dtype), x_0)


def jump(
    x_t: Tensor, x_0: Tensor, here: Levels, there: Levels, keep: Tensor | float = 1.0, z: Tensor | None = None
) -> Tensor:
    """One first-order step from level `here` to level `there`, where x0 is taken to be constant; sigma of `here` is not 0.

    x_s = alpha_s x_0 + sigma_s (keep eps_hat + sqrt(1 - keep^2) z),  eps_hat = (x_t - alpha_t x_0) / sigma_t.

    In y this is y_s = rho y_t + (1 - rho) x_0 + q_s sqrt(1 - rho^2 q_t^2 / q_s^2) z with rho = keep q_s / q_t, but finite
    where alpha_t = 0. keep = 1 is DDIM, see KEEP for others; z of shape x_t is needed where keep < 1.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = here, there
    noise = (x_t - alpha_t * x_0) / sigma_t
    if z is not None:
        share = torch.as_tensor(keep, dtype=noise.dtype, device=noise.device)
        noise = share * noise + (1 - share**2).clamp_min(0).sqrt() * z
    return alpha_s * x_0 + sigma_s * noise


def ddim(x_0_of: Callable[[Tensor, Tensor], Tensor], grid: Grid, z: Tensor) -> Tensor:
    """The sample at the end of DDIM through all levels of `grid`, from the noise z; `x_0_of` is (x_t, t) -> x0."""
    x = grid.schedule.init_sigma * z
    for number in range(grid.size, 0, -1):
        level = torch.full((len(z),), number, device=z.device)
        x_0 = x_0_of(x, grid.time(level, x))
        x = jump(x, x_0, grid.levels(level, x), grid.levels(level - 1, x))
    return x


def gains(grid: Grid, prediction: Prediction) -> Tensor:
    """|d x_(n-1) / d output| / (alpha^2 + sigma^2)^(1/2) of DDIM's step from level n, alpha and sigma those of n - 1.

    Shape (size + 1,), in the grid's precision: by how much of what is there an error of the output moves it. Level 0 has
    no step, and 0.
    """
    level = torch.arange(1, grid.size + 1, device=grid.times.device)
    zero = torch.zeros_like(grid.alpha[1:])
    here, there = grid.levels(level, zero), grid.levels(level - 1, zero)
    one, none = (jump(zero, prediction.to_x0(output, zero, *here), here, there) for output in (zero + 1, zero))
    return F.pad((one - none).abs() / torch.hypot(*there), (1, 0))


def ratio(here: Levels, there: Levels) -> Tensor:
    """q_s / q_t, finite where alpha_t = 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = here, there
    return sigma_s * alpha_t / (alpha_s * sigma_t)


def keep_ddim(here: Levels, there: Levels, eta: float) -> Tensor:
    """keep of DDIM with noise eta (Song et al. 2021, eq. 16): sqrt(1 - eta^2 (1 - q_s^2 / q_t^2)); eta = 1 is DDPM."""
    return (1 - eta**2 * (1 - ratio(here, there) ** 2)).sqrt()


def keep_er_sde(here: Levels, there: Levels, eta: float) -> Tensor:
    """keep of ER-SDE (Cui et al. 2023, arXiv 2309.06169) with phi(q) = q^(1 + eta^2): (q_s / q_t)^(eta^2)."""
    return ratio(here, there) ** (eta**2)


def keep_er_sde_5(here: Levels, there: Levels, eta: float) -> Tensor:
    """keep of "ER-SDE 5", phi(q) = q (exp(q^0.3) + 10), raised to eta^2: the paper's own at eta = 1."""
    low, high = (((sigma / alpha) ** 0.3).clamp_max(60).exp() + 10 for alpha, sigma in (there, here))
    return (low / high) ** (eta**2)


KEEP: dict[str, Callable[[Levels, Levels, float], Tensor]] = {
    "ddim": keep_ddim,
    "er-sde": keep_er_sde,
    "er-sde-5": keep_er_sde_5,
}
"""How much of eps_hat a stochastic step keeps: (here, there, eta) -> (B, 1, ...); eta = 0 keeps all of it."""


def heun(x_t: Tensor, x_0: Tensor, here: Levels, there: Levels, x_0_there: Callable[[Tensor], Tensor]) -> Tensor:
    """A step of second order: DDIM, then the mean of the slopes at both ends; one more call of the network.

    The slope is that of x / (alpha + sigma) against sigma / (alpha + sigma), eps_hat - x0, finite at both ends of every
    schedule. `x_0_there` is the denoiser at the level `there`. Where that is level 0, a sample without noise has no slope
    and the step is DDIM's, whose error there is of second order in q of `here`.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = here, there
    euler = jump(x_t, x_0, here, there)
    after = x_0_there(euler)
    noise = (euler - alpha_s * after) / torch.where(sigma_s > 0, sigma_s, 1.0)
    slopes = [(x_t - alpha_t * x_0) / sigma_t - x_0, noise - after]
    way = sigma_s / (alpha_s + sigma_s) - sigma_t / (alpha_t + sigma_t)
    x_s = (alpha_s + sigma_s) * (x_t / (alpha_t + sigma_t) + way * (slopes[0] + slopes[1]) / 2)
    return torch.where(sigma_s > 0, x_s, euler)
