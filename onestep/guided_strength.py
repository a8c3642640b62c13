"""How strongly guidance adapters act: set so that they move samples as far as two passes of the network do, or as near."""

from collections.abc import Callable
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
STEP = 0.1


class Strength(NamedTuple):
    """What adapters are multiplied by in the middle of their range of guidance, and how much more at its upper end."""

    strength: float = 1.0
    tilt: float = 0.0

    @property
    def ends(self) -> tuple[float, float]:
        """Those at the least and the most guidance."""
        return self.strength - self.tilt, self.strength + self.tilt


class Start(NamedTuple):
    """Noise (B, ...), conditions and guidance, both (B,)."""

    z: Tensor
    conditions: Tensor
    w: Tensor


@torch.no_grad()
def matched_strength(
    generator: GuidedSampler, teacher: Teacher, count: int, to: str = "distance", seed: int = 0
) -> Strength:
    """k(w), linear in w, by `count` samples of the generator's steps, of guidance evenly spaced over [low, high].

    From the same noise, x_1 is the unguided sample, x_w that of two passes a step, and x(k) that of the adapters times k;
    |.| is the root mean square over a sample. k is in 1/2 .. 2, and, nearly where it is linear,

        to "distance":  E |x(k) - x_1| = E |x_w - x_1| in each half   two steps of the secant method, five passes a step
        to "samples":   E |x(k) - x_w|^2 is the least                 one step of Gauss and Newton's, four passes

    Adapters are fitted by least squares, and leave out what they cannot explain: they guide too little. To act as far as two
    passes, what they do explain becomes more than it is. 1 everywhere where guidance moves no sample of a half.
    """
    config, samples = adapter_of(generator).config, Samples(generator, teacher, count, seed)
    try:
        return RULES[to](samples)
    finally:
        set_strength(generator, Strength(config.strength, config.tilt))


class Samples:
    """Samples of a teacher and of adapters of it, of the same noise, conditions and guidance; all (count, D)."""

    def __init__(self, generator: GuidedSampler, teacher: Teacher, count: int, seed: int):
        config, self.generator, self.teacher = adapter_of(generator).config, generator, teacher
        self.grid = Grid(teacher.denoiser.schedule, len(generator.times), device=teacher.device)
        assert count >= 2, "one for each half"
        self.place = (torch.arange(count, device=teacher.device) + 0.5) / count
        self.starts = list[Start]()
        for number, part in enumerate(self.place.split(BATCH)):
            rng, w = Rng(seed, number, len(part), device=teacher.device), config.low + (config.high - config.low) * part
            self.starts.append(Start(rng.normal(teacher.shape), rng.integers(teacher.classes), w))

    def of(self, denoiser: Denoiser, guides: bool = True) -> Tensor:
        """Those that `denoiser` makes."""
        return torch.cat([_sample(denoiser, self.teacher, self.grid, start, guides) for start in self.starts]).flatten(1)

    def at(self, k: Tensor) -> Tensor:
        """Those of the adapters at strength k."""
        set_strength(self.generator, line(k))
        return self.of(self.generator.denoiser)

    def halves(self, each: Tensor) -> Tensor:
        """Sums over the lower and the upper half of the range of guidance, (count,) -> (2,)."""
        return torch.stack([each[self.place < 0.5].sum(), each[self.place >= 0.5].sum()])


def as_far(samples: Samples) -> Strength:
    """As far from unguided samples as those of two passes."""
    plain, two = (samples.of(samples.teacher.denoiser, guides) for guides in (False, True))

    def far(moved: Tensor) -> Tensor:
        return samples.halves((moved - plain).square().mean(1).sqrt())

    wanted = far(two)
    if not bool((wanted > 0).all()):
        return Strength()
    one = torch.ones_like(wanted)
    once = far(samples.at(one)) / wanted
    guess = (1 / once.clamp_min(1e-6)).clamp(*LIMITS)
    slope = torch.where(guess == 1, one, (far(samples.at(guess)) / wanted - once) / (guess - 1))
    return line(torch.where(slope > 0, 1 + (1 - once) / slope, guess))


def closest(samples: Samples) -> Strength:
    """As near to the samples of two passes as can be."""
    two, one = samples.of(samples.teacher.denoiser), samples.place.new_ones(2)
    here, more = samples.at(one), samples.at(one * (1 + STEP))
    along = (more - here) / STEP
    size, wanted = along.square().sum(1), ((two - here) * along).sum(1)
    if not bool((samples.halves(size) > 0).all()):
        return Strength()
    basis = torch.stack([1.5 - 2 * samples.place, 2 * samples.place - 0.5]).to(size)  # of lines, by their values at 1/4, 3/4
    change = torch.linalg.solve((basis * size) @ basis.T, basis @ wanted)
    return line(1 + change)


RULES: dict[str, Callable[[Samples], Strength]] = {"distance": as_far, "samples": closest}
"""What the strength may be matched to."""


def line(k: Tensor) -> Strength:
    """The line through k (2,) at a quarter and at three quarters of the range; k and its ends are kept in LIMITS."""
    k = k.clamp(*LIMITS)
    low, high = ((3 * k - k.flip(0)) / 2).clamp(*LIMITS).tolist()
    return Strength((low + high) / 2, (high - low) / 2)


def set_strength(generator: GuidedSampler, strength: Strength) -> None:
    """What the generator's adapters add is multiplied by this, whatever it was before; an export keeps it."""
    adapter_of(generator).register_to_config(**strength._asdict())


def adapter_of(generator: GuidedSampler) -> Any:
    """The `GuidanceAdapter` that the generator samples with."""
    network = unwrap(generator.denoiser.network)
    assert isinstance(network, Guided)
    return network.adapter


def _sample(denoiser: Denoiser, teacher: Teacher, grid: Grid, start: Start, guides: bool) -> Tensor:
    cond, uncond = teacher.encode(start.conditions)
    w = start.w.view(-1, *(1,) * (start.z.ndim - 1)) if guides else None
    return ddim(lambda x, t: guided(denoiser, x, t, cond, uncond, w), grid, start.z)
