"""Random draws of one training step, the same for every number of processes and every split into micro-batches."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Rng:
    """Draws for items `start` to `stop` of a global batch of `total`, a pure function of (seed, step).

    Every process draws for the whole global batch and keeps its own rows, so that two processes, or two accumulated
    micro-batches, see the noise that one would have seen; and a resumed run needs no saved generator state.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        total: int,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.total, self.rows, self.device, self.dtype = (
            total,
            slice(start, total if stop is None else stop),
            device,
            dtype,
        )
        mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % 2**63
        self.generator = torch.Generator(device).manual_seed(mixed)
        self._shared = torch.Generator("cpu").manual_seed(mixed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, shape (rows, *shape)."""
        draws = torch.randn(self.total, *shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return draws[self.rows]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform draws, one an item, shape (rows,)."""
        draws = torch.rand(self.total, generator=self.generator, device=self.device, dtype=self.dtype)
        return (low + (high - low) * draws)[self.rows]

    def integers(self, high: int) -> Tensor:
        """Integers in 0 .. high-1, one an item, shape (rows,)."""
        return torch.randint(high, (self.total,), generator=self.generator, device=self.device)[self.rows]

    def shared_integer(self, high: int) -> int:
        """One integer in 0 .. high-1 that every process and micro-batch draws alike."""
        return int(torch.randint(high, (), generator=self._shared))
