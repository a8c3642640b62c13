"""Whether an exported folder makes the generator's pictures, by plain diffusers on the CPU."""

from pathlib import Path

import torch
from torch import Tensor

from .denoiser import Denoiser
from .generator import Generator
from .metrics.render import family_of, load_pipeline
from .schedule import VP
from .teacher import Teacher

TOLERANCE = 1e-5
"""Largest deviation of a picture in [0, 1] in float32, for sigma/alpha up to 10 at the first step. Beyond, it grows in
proportion, to 2e-4 at most: x0 = (x_t - sigma eps) / alpha multiplies float32's own rounding by sigma/alpha."""
HALF_TOLERANCE = 0.03
"""Largest mean deviation of a picture in [0, 1] when the folder is run in fp16 or bf16, where rounding dominates."""
SEEDS = (0, 1, 2, 3)


def verify(folder: Path, generator: Generator, teacher: Teacher, dtype: torch.dtype) -> None:
    """Compare the reloaded folder with the generator on the weights of `teacher`, which holds the export in float32."""
    live = generator.denoiser
    student = Denoiser(teacher.denoiser.network, live.schedule, live.prediction, live.call)
    reference = Generator(student, generator.times, generator.input_scale)
    alpha_t, sigma_t = live.schedule.coefficients(generator.time(0, torch.zeros(1)))
    rho = float(sigma_t / alpha_t) if isinstance(live.schedule, VP) else 1.0
    for arithmetic in dict.fromkeys((torch.float32, dtype)):
        want = own_pictures(reference, teacher, arithmetic)
        error = (stock_pictures(folder, teacher, len(generator.times), arithmetic) - want).abs()
        if not want.isfinite().all():
            raise ValueError("the student makes pictures with NaN or infinity: export an earlier checkpoint")
        if arithmetic == torch.float32 and not error.max() <= TOLERANCE * min(max(1.0, rho / 10), 20.0):
            raise RuntimeError(f"the exported folder deviates from the generator by {error.max():.3g}, so it is dropped")
        if not error.mean() <= HALF_TOLERANCE:
            raise ValueError(
                f"in {arithmetic} the exported pictures deviate by {error.mean():.3g} on average, more than "
                f"{HALF_TOLERANCE}; type --export-dtype fp32"
            )


def stock_pictures(folder: Path, teacher: Teacher, steps: int, dtype: torch.dtype) -> Tensor:
    """What plain diffusers makes of the folder on the CPU, one generator an image, shape (B, C, H, W) in [0, 1]."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of half precision on a CPU, which this very run is about
    try:
        pipeline = load_pipeline(folder, "cpu", dtype)
    finally:
        logging.set_verbosity(verbosity)
    labels = [seed % teacher.classes for seed in SEEDS]
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would also reseed the accelerators that a training is drawing from
        torch.default_generator.manual_seed(SEEDS[0])
        sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        return family_of(pipeline).sample(pipeline, labels, sources, steps, 1.0).float()


@torch.no_grad()
def own_pictures(generator: Generator, teacher: Teacher, dtype: torch.dtype) -> Tensor:
    """The generator's pictures from the noise that `stock_pictures` sees, drawn in `dtype`, computed in float32."""
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def draw() -> Tensor:
        return torch.cat([torch.randn((1, *teacher.shape), generator=each, dtype=dtype) for each in sources]).float()

    z, count = draw(), len(generator.times) - 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEEDS[0])
        # a stock pipeline that hands its generators to the first noise alone takes the others from torch's own
        noises = [draw() if teacher.seeded_chain else torch.randn(z.shape, dtype=dtype).float() for _ in range(count)]
    cond, _ = teacher.encode(torch.tensor([seed % teacher.classes for seed in SEEDS]))
    return teacher.to_images(generator(z, cond, noises)).float()
