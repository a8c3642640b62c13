"""Whether an exported folder makes the generator's pictures, by plain diffusers on the CPU."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .denoiser import Denoiser, body
from .generator import Generator, part_of
from .precision import HALVES, full_precision
from .quiet import quiet
from .schedule import VP, RectifiedFlow
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


def verify(
    folder: Path,
    network: nn.Module,
    generator: Generator,
    teacher: Teacher,
    dtype: torch.dtype,
    counts: Sequence[int] = (),
    guidance: float = 1.0,
) -> None:
    """Compare the reloaded folder's weights with `network`, and its pictures with those of a generator made of them.

    `network` is the generator's in the folder's `dtype`. `counts` are the numbers of steps to compare, by default that of
    the generator; with fewer it is `part_of` its chain. A network that takes its guidance as an input is compared at
    `guidance` and at another. Raises RuntimeError where they are not the same, ValueError where the student or `dtype` is
    not up to it.
    """
    values = [guidance, guidance + 1.5] if takes_guidance(network) else [None]
    # a number of steps each, and each guidance of a network that takes it
    cases = [(steps, value) for steps in counts or [len(generator.times)] for value in values]
    with quiet(), ExitStack() as stack:  # it warns of half precision on a CPU, which this very run is about
        large = is_large(network)
        pipeline = plain_pipeline(folder, dtype if large else torch.float32, teacher.remote_code)
        stored = type(teacher)(pipeline, teacher.facts, teacher.resolution)
        if isinstance(stored, TextTeacher):
            stored.use_texts(stored.prompts[: 1 if large else None])  # batches as the pipeline's, to be rounded alike
        check_weights(network, stored.denoiser.network)
        if large:
            stack.enter_context(full_precision(network))
            stack.enter_context(_given_float32(stored.denoiser.network))
            if stored.noise_dtype(dtype) != dtype:
                stack.enter_context(_said_float32(stored.denoiser.network, pipeline.vae))
            runs = [(dtype, True)]
        else:
            runs = [(torch.float32, True)] + [(dtype, False)] * (dtype != torch.float32)
        for kind, exact in runs:
            if not large:
                pipeline.to(kind)  # one that is loaded in half precision has buffers in float32, which this would round
            for steps, value in cases:
                stored.facts = teacher.facts if value is None else replace(teacher.facts, embedded_guidance=value)
                _compare(pipeline, stored, generator, kind, SEEDS[: 1 if large else None], exact, steps)


def _compare(
    pipeline: Any, stored: Teacher, generator: Generator, dtype: torch.dtype, seeds: Sequence[int], exact: bool, steps: int
) -> None:
    """The pipeline's pictures with its parts in `dtype` against those of a generator around the same weights.

    `exact`: arithmetic is in float32, and the pictures are the same to TOLERANCE.
    """
    live = generator.denoiser
    student = Denoiser(stored.denoiser.network, live.schedule, live.prediction, stored.call)
    chain = Generator(student, part_of(generator.times, steps), generator.input_scale)
    # where arithmetic is in float32 so are a chain's later noises, whatever the first is drawn in
    x_0 = own_x0(chain, stored, dtype, seeds, torch.float32 if exact else dtype)
    want = pictures_of(x_0, stored)
    if not want.isfinite().all():
        raise ValueError("the student makes pictures with NaN or infinity: export an earlier checkpoint")
    error = (stock_pictures(pipeline, stored, steps, seeds) - want).abs()
    if exact and not error.max() <= tolerance_of(generator) and not error.max() <= rounding(x_0, want, stored):
        raise RuntimeError(
            f"the exported folder deviates from the generator by {error.max():.3g} at num_inference_steps={steps}, so it is "
            "dropped"
        )
    if not error.mean() <= HALF_TOLERANCE:
        raise ValueError(
            f"in {dtype} the exported pictures deviate by {error.mean():.3g} on average, more than "
            f"{HALF_TOLERANCE}; type --export-dtype fp32"
        )


def is_large(network: nn.Module) -> bool:
    """Whether half precision is compared as LARGE says."""
    return sum(p.numel() for p in network.parameters()) > LARGE


def tolerance_of(generator: Generator) -> float:
    """TOLERANCE for the noise level that the generator starts at."""
    alpha_t, sigma_t = generator.denoiser.schedule.coefficients(generator.time(0, torch.zeros(1)))
    rho = float(sigma_t / alpha_t) if isinstance(generator.denoiser.schedule, VP) else 1.0
    return TOLERANCE * min(max(1.0, rho / 10), 20.0)


def takes_guidance(network: nn.Module) -> bool:
    """Whether a UNet takes its guidance as an input, which stock pipelines then feed by themselves (LCM)."""
    inner: Any = body(network)
    return inner.config.get("time_cond_proj_dim") is not None


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


@contextmanager
def _said_float32(*modules: nn.Module) -> Iterator[None]:
    """The modules say that their dtype is float32: a pipeline that rounds float32 latents to it does not round them."""
    kinds = [type(module) for module in modules]
    for module, kind in zip(modules, kinds):
        module.__class__ = type(kind.__name__, (kind,), {"dtype": torch.float32})
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds):
            module.__class__ = kind


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
def own_x0(
    generator: Generator,
    teacher: Teacher,
    dtype: torch.dtype,
    seeds: Sequence[int],
    later: torch.dtype = torch.float32,
) -> Tensor:
    """The generator's x0 from the noise that `stock_pictures` sees, computed in float32.

    The first noise is that of a pipeline whose parts are of `dtype`, and a chain's later ones are drawn in `later`.
    """
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    if isinstance(generator.denoiser.schedule, RectifiedFlow):
        later = torch.float32  # its scheduler always computes in it

    def draw(kind: torch.dtype) -> Tensor:
        return torch.cat([torch.randn((1, *teacher.shape), generator=each, dtype=kind) for each in sources]).float()

    z, noises = draw(teacher.noise_dtype(dtype)), []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds[0])
        for _ in generator.times[1:]:
            # a stock pipeline that hands its generators to the first noise alone takes the others from torch's own
            noises.append(draw(later) if teacher.seeded_chain else teacher.later_noise(z.shape, later).float())
    cond, _ = teacher.encode(torch.tensor([seed % teacher.classes for seed in seeds]))
    return generator(z, cond, noises)
