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


class Strength(NamedTuple):
    """What adapters are multiplied by in the middle of their range of guidance, and how much more at its upper end."""

    strength: float = 1.0
    tilt: float = 0.0


@torch.no_grad()
def matched_strength(generator: GuidedSampler, teacher: Teacher, count: int, seed: int = 0) -> Strength:
    """k(w), linear in w, with E |x(k) - x_1| = E |x_w - x_1| in each half of the range, over `count` samples.

    From the same noise, x_1 is the unguided sample, x_w that of two passes a step, and x(k) that of the adapters times k;
    |.| is the root mean square over a sample, of the generator's steps. Adapters are fitted by least squares, and leave out
    what they cannot explain: they guide too little. k at a quarter and at three quarters of the range, both in 1/2 .. 2, is
    found by two steps of the secant method, with five passes of the network for each step of a sample. 1 everywhere where
    guidance moves no sample of a half. Guidance w is evenly spaced over [low, high].
    """
    config = adapter_of(generator).config
    grid, starts = Grid(teacher.denoiser.schedule, len(generator.times), device=teacher.device), list[Start]()
    place = (torch.arange(count, device=teacher.device) + 0.5) / count
    for number, part in enumerate(place.split(BATCH)):
        rng = Rng(seed, number, len(part), device=teacher.device)
        w = config.low + (config.high - config.low) * part
        starts.append(Start(rng.normal(teacher.shape), rng.integers(teacher.classes), w))

    def samples(denoiser: Denoiser, guides: bool = True) -> Tensor:
        return torch.cat([_sample(denoiser, teacher, grid, start, guides) for start in starts])

    plain = samples(teacher.denoiser, guides=False)

    def far(moved: Tensor) -> Tensor:
        each = (moved - plain).flatten(1).square().mean(1).sqrt()
        return torch.stack([each[place < 0.5].sum(), each[place >= 0.5].sum()])

    wanted = far(samples(teacher.denoiser))
    if not bool((wanted > 0).all()):
        return Strength()

    def size(k: Tensor) -> Tensor:
        set_strength(generator, _line(k))
        return far(samples(generator.denoiser)) / wanted

    try:
        one = torch.ones_like(wanted)
        once = size(one)
        guess = (1 / once.clamp_min(1e-6)).clamp(*LIMITS)
        slope = torch.where(guess == 1, one, (size(guess) - once) / (guess - 1))
        return _line(torch.where(slope > 0, 1 + (1 - once) / slope, guess).clamp(*LIMITS))
    finally:
        set_strength(generator, Strength(config.strength, config.tilt))


def set_strength(generator: GuidedSampler, strength: Strength) -> None:
    """What the generator's adapters add is multiplied by this, whatever it was before; an export keeps it."""
    adapter_of(generator).register_to_config(**strength._asdict())


def adapter_of(generator: GuidedSampler) -> Any:
    """The `GuidanceAdapter` that the generator samples with."""
    network = unwrap(generator.denoiser.network)
    assert isinstance(network, Guided)
    return network.adapter


def _line(k: Tensor) -> Strength:
    """The line through k (2,) at a quarter and at three quarters of the range."""
    low, high = k.tolist()
    return Strength((low + high) / 2, high - low)


def _sample(denoiser: Denoiser, teacher: Teacher, grid: Grid, start: Start, guides: bool) -> Tensor:
    cond, uncond = teacher.encode(start.conditions)
    w = start.w.view(-1, *(1,) * (start.z.ndim - 1)) if guides else None
    return ddim(lambda x, t: guided(denoiser, x, t, cond, uncond, w), grid, start.z)
