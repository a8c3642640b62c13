"""The student: noise to x0 in one call, or in a short chain of calls."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .denoiser import Cond, Denoiser
from .prediction import add_noise
from .rng import Rng
from .schedule import Schedule


def steps_from(schedule: Schedule, init_rho: float | None, steps: int) -> list[float]:
    """Times of a `steps`-step chain: the first has sigma/alpha nearest `init_rho`, the rest follow as `Schedule.chain` says.

    None starts at the schedule's end. Raises ValueError where there are not so many times.
    """
    first = schedule.grid(1)[0] if init_rho is None else schedule.at_rho(init_rho)
    return schedule.chain(first, steps)


def part_of(times: Sequence[float], steps: int) -> list[float]:
    """The shorter chain within a chain of n times: every (n / steps)-th of them from the first on; `steps` divides n."""
    return list(times[:: len(times) // steps])


class Generator(nn.Module):
    """x0 = G(z, cond) with z ~ N(0, I): the denoiser read at `times[0]` on `input_scale * z`, shape (B, C, H, W).

    With several times it is the chain x0 <- denoiser(alpha_t x0 + sigma_t eps, t) with fresh noise at each later t
    (DMD2, Yin et al. 2024, section 4.4).
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float], input_scale: float = 1.0):
        super().__init__()
        self.denoiser, self.times, self.input_scale = denoiser, list(times), input_scale

    def time(self, index: int, like: Tensor) -> Tensor:
        """The index-th time of the chain as a batch, shape (B,)."""
        value = self.times[index]
        dtype = torch.long if isinstance(value, int) else torch.promote_types(like.dtype, torch.float32)
        return torch.full((len(like),), value, device=like.device, dtype=dtype)

    def first(self, z: Tensor, cond: Cond) -> Tensor:
        """The chain's first call, on pure noise."""
        return self.denoiser(self.input_scale * z, self.time(0, z), cond)

    def later(self, x_0: Tensor, eps: Tensor, index: int, cond: Cond) -> Tensor:
        """The chain's index-th call, index >= 1, on the re-noised result of the one before."""
        t = self.time(index, x_0)
        return self.denoiser(add_noise(self.denoiser.schedule, x_0, eps, t), t, cond)

    @property
    def draws(self) -> int:
        """Noises that a sample takes: the first, and a fresh one for each later time."""
        return len(self.times)

    def around(self, denoiser: Denoiser) -> "Generator":
        """The same generator of another denoiser."""
        return Generator(denoiser, self.times, self.input_scale)

    def forward(self, z: Tensor, cond: Cond, noises: Sequence[Tensor] = ()) -> Tensor:
        """x0, shape of z; `noises` are the fresh draws of a chain, one for each time after the first."""
        x_0 = self.first(z, cond)
        for index, eps in enumerate(noises, start=1):
            x_0 = self.later(x_0, eps, index, cond)
        return x_0

    def simulate(self, shape: Sequence[int], cond: Cond, rng: Rng, grad: bool) -> Tensor:
        """x0 = G(z) for training, shape (B, *shape); `grad` asks for its gradient.

        A chain is run for a random number of calls, the same on every process, with the gradient in the last of them:
        backward simulation (DMD2, section 4.5).
        """
        z = rng.normal(shape)
        last = rng.shared_integer(len(self.times))
        with torch.set_grad_enabled(grad and last == 0):
            x = self.first(z, cond)
        for index in range(1, last + 1):
            with torch.set_grad_enabled(grad and index == last):
                x = self.later(x, rng.normal(shape), index, cond)
        return x
