"""How strongly guidance adapters act: set so that they move samples as far as two passes of the network do."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser, guided, unwrap
from .guided import Guided
from .guided_sampler import GuidedSampler
from .rng import Rng
from .teacher import Teacher
from .trajectory import Grid, ddim

LIMITS = (0.5, 2.0)
BATCH = 64


class Start(NamedTuple):
    """Noise (B, ...), conditions and guidance, both (B,)."""

    z: Tensor
    conditions: Tensor
    w: Tensor


@torch.no_grad()
def matched_strength(generator: GuidedSampler, teacher: Teacher, count: int, seed: int = 0) -> float:
    """k in 1/2 .. 2 with E |x(k) - x_1| = E |x_w - x_1|, over `count` samples of the generator's steps.

    From the same noise, x_1 is the unguided sample, x_w that of guidance w ~ U[low, high] in two passes a step, and x(k)
    that of the adapters times k; |.| is the root mean square over a sample. Adapters are fitted by least squares, and leave
    out what they cannot explain: they guide too little, by a share that hardly depends on w. k is found by two steps of the
    secant method, with five passes of the network for each step of a sample. 1 where guidance moves no sample.
    """
    config = adapter_of(generator).config
    grid, starts = Grid(teacher.denoiser.schedule, len(generator.times), device=teacher.device), list[Start]()
    for number, first in enumerate(range(0, count, BATCH)):
        rng = Rng(seed, number, min(BATCH, count - first), device=teacher.device)
        w = rng.uniform(config.low, config.high)
        starts.append(Start(rng.normal(teacher.shape), rng.integers(teacher.classes), w))

    def samples(denoiser: Denoiser, guides: bool = True) -> list[Tensor]:
        return [_sample(denoiser, teacher, grid, start, guides) for start in starts]

    plain = samples(teacher.denoiser, guides=False)

    def far(moved: list[Tensor]) -> float:
        return sum(float((a - b).flatten(1).square().mean(1).sqrt().sum()) for a, b in zip(moved, plain))

    wanted = far(samples(teacher.denoiser))
    if wanted == 0:
        return 1.0

    def size(strength: float) -> float:
        set_strength(generator, strength)
        return far(samples(generator.denoiser)) / wanted

    try:
        once = size(1.0)
        guess = _within(1 / max(once, 1e-6))
        slope = (size(guess) - once) / (guess - 1) if guess != 1 else 1.0
        return _within(1 + (1 - once) / slope) if slope > 0 else guess
    finally:
        set_strength(generator, config.strength)


def set_strength(generator: GuidedSampler, strength: float) -> None:
    """What the generator's adapters add is multiplied by this, whatever it was before; an export keeps it."""
    adapter_of(generator).register_to_config(strength=strength)


def adapter_of(generator: GuidedSampler) -> Any:
    """The `GuidanceAdapter` that the generator samples with."""
    network = unwrap(generator.denoiser.network)
    assert isinstance(network, Guided)
    return network.adapter


def _within(strength: float) -> float:
    return min(max(strength, LIMITS[0]), LIMITS[1])


def _sample(denoiser: Denoiser, teacher: Teacher, grid: Grid, start: Start, guides: bool) -> Tensor:
    cond, uncond = teacher.encode(start.conditions)
    w = start.w.view(-1, *(1,) * (start.z.ndim - 1)) if guides else None
    return ddim(lambda x, t: guided(denoiser, x, t, cond, uncond, w), grid, start.z)
