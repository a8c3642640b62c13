"""Whether an exported folder makes the generator's pictures, by plain diffusers on the CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .denoiser import Denoiser
from .generator import Generator
from .precision import HALVES, full_precision
from .quiet import quiet
from .schedule import VP
from .teacher import Teacher
from .teacher.text import TextTeacher

TOLERANCE = 1e-5
"""Largest deviation of a picture in [0, 1] in float32, for sigma/alpha up to 10 at the first step. Beyond, it grows in
proportion, to 2e-4 at most: x0 = (x_t - sigma eps) / alpha multiplies float32's own rounding by sigma/alpha."""
ROUNDING = 1e-6
"""Relative deviation of x0 that is float32's own: some eight roundings on the way from the network's output."""
HALF_TOLERANCE = 0.03
"""Largest mean deviation of a picture in [0, 1] when the folder is run in fp16 or bf16, where rounding dominates."""
SEEDS = (0, 1, 2, 3)
LARGE = 500_000_000
"""Parameters beyond which half precision stays as it is stored while arithmetic is in float32, on one picture: a float32
copy may not fit beside the teacher, and half-precision arithmetic takes a CPU hours."""


def verify(folder: Path, network: nn.Module, generator: Generator, teacher: Teacher, dtype: torch.dtype) -> None:
    """Compare the reloaded folder's weights with `network`, and its pictures with those of a generator made of them.

    `network` is the generator's in the folder's `dtype`. Raises RuntimeError where they are not the same, ValueError where
    the student or `dtype` is not up to it.
    """
    large = sum(p.numel() for p in network.parameters()) > LARGE
    with quiet():  # it warns of half precision on a CPU, which this very run is about
        pipeline = plain_pipeline(folder, dtype if large else torch.float32, teacher.remote_code)
        stored = type(teacher)(pipeline, teacher.facts, teacher.resolution)
        check_weights(network, stored.denoiser.network)
        if large:
            with full_precision(network), _given_float32(stored.denoiser.network):
                _compare(pipeline, stored, generator, dtype, SEEDS[:1], exact=True)
            return
        _compare(pipeline, stored, generator, torch.float32, SEEDS, exact=True)
        if dtype != torch.float32:
            _compare(pipeline, stored, generator, dtype, SEEDS, exact=False)


def _compare(
    pipeline: Any, stored: Teacher, generator: Generator, dtype: torch.dtype, seeds: Sequence[int], exact: bool
) -> None:
    """The pipeline's pictures with its parts in `dtype` against those of a generator around the same weights.

    `exact`: arithmetic is in float32, and the pictures are the same to TOLERANCE.
    """
    live = generator.denoiser
    if isinstance(stored, TextTeacher):
        stored.use_texts(stored.prompts)
    student = Denoiser(stored.denoiser.network, live.schedule, live.prediction, stored.call)
    x_0 = own_x0(Generator(student, generator.times, generator.input_scale), stored, dtype, seeds)
    want = pictures_of(x_0, stored)
    if not want.isfinite().all():
        raise ValueError("the student makes pictures with NaN or infinity: export an earlier checkpoint")
    error = (stock_pictures(pipeline.to(dtype), stored, len(generator.times), seeds) - want).abs()
    alpha_t, sigma_t = live.schedule.coefficients(generator.time(0, torch.zeros(1)))
    rho = float(sigma_t / alpha_t) if isinstance(live.schedule, VP) else 1.0
    allowed = TOLERANCE * min(max(1.0, rho / 10), 20.0)
    if exact and not error.max() <= allowed and not error.max() <= rounding(x_0, want, stored):
        raise RuntimeError(f"the exported folder deviates from the generator by {error.max():.3g}, so it is dropped")
    if not error.mean() <= HALF_TOLERANCE:
        raise ValueError(
            f"in {dtype} the exported pictures deviate by {error.mean():.3g} on average, more than "
            f"{HALF_TOLERANCE}; type --export-dtype fp32"
        )


@contextmanager
def _given_float32(network: nn.Module) -> Iterator[None]:
    """The network is given what it is given in float32, as the generator gives it.

    diffusers rounds a timestep's sines and cosines to the dtype of the latents, which in half precision moves x0 by more
    than TOLERANCE. Users of a half-precision folder have that rounding; it is arithmetic, not the folder's contents.
    """

    def upcast(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda each: each.float() if _is_half(each) else each, (args, kwargs))

    hook = network.register_forward_pre_hook(upcast, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALVES


def plain_pipeline(folder: Path, dtype: torch.dtype, remote_code: bool = False) -> Any:
    """The folder as any user of diffusers loads it, on the CPU; `remote_code`: with the code that is in it."""
    from diffusers import DiffusionPipeline

    trust = {"trust_remote_code": True} if remote_code else {}
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, torch_dtype=dtype, **trust
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_weights(written: nn.Module, read: nn.Module) -> None:
    """Raises RuntimeError where a weight that was read is not the one that was written."""
    want, found = written.state_dict(), read.state_dict()
    for name in {*want, *found}:
        if name not in want or name not in found or not _same(want[name], found[name]):
            raise RuntimeError(f"{name} was not stored as it is in the generator, so the export is dropped")


def _same(written: Tensor, read: Tensor) -> bool:
    return torch.equal(written.to(read.dtype).nan_to_num(), read.nan_to_num())  # a NaN is told by its pictures


def stock_pictures(pipeline: Any, teacher: Teacher, steps: int, seeds: Sequence[int]) -> Tensor:
    """What plain diffusers makes of the folder on the CPU, one generator an image, shape (B, C, H, W) in [0, 1]."""
    given = teacher.arguments([seed % teacher.classes for seed in seeds])
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would also reseed the accelerators that a training is drawing from
        torch.default_generator.manual_seed(seeds[0])
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(**given, num_inference_steps=steps, generator=sources, output_type="pt").images
    # DiTPipeline gives an array (B, H, W, C) whatever it is asked for
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images.float()


def rounding(x_0: Tensor, pictures: Tensor, teacher: Teacher) -> float:
    """How far the pictures of x_0 move where each of its elements moves by ROUNDING of its size, up or down.

    What a decoder makes of rounding is no fault of the export; one with large or random weights makes more than TOLERANCE.
    """
    signs = torch.randint(2, x_0.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return float((pictures_of(x_0 * (1 + ROUNDING * signs), teacher) - pictures).abs().max())


@torch.no_grad()
def pictures_of(x_0: Tensor, teacher: Teacher) -> Tensor:
    return teacher.to_images(x_0).float()


@torch.no_grad()
def own_x0(generator: Generator, teacher: Teacher, dtype: torch.dtype, seeds: Sequence[int]) -> Tensor:
    """The generator's x0 from the noise that `stock_pictures` sees, drawn in `dtype`, computed in float32."""
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    kind = teacher.noise_dtype(dtype)

    def draw() -> Tensor:
        return torch.cat([torch.randn((1, *teacher.shape), generator=each, dtype=kind) for each in sources]).float()

    z, count = draw(), len(generator.times) - 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds[0])
        # a stock pipeline that hands its generators to the first noise alone takes the others from torch's own
        noises = [draw() if teacher.seeded_chain else torch.randn(z.shape, dtype=kind).float() for _ in range(count)]
    cond, _ = teacher.encode(torch.tensor([seed % teacher.classes for seed in seeds]))
    return generator(z, cond, noises)
