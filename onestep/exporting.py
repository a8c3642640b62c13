"""A generator as a stock diffusers folder: plain diffusers makes its pictures, without onestep or magic numbers.

The folder holds the student's network, a diffusers scheduler whose own timesteps are the student's, the teacher's other
parts and a model card. It is reloaded and its pictures are compared with the generator's before it takes its name.
"""

import copy
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .card import LORA_NAME, Card, card_text
from .denoiser import body, unwrap
from .files import fsync
from .generator import Generator, part_of
from .lora import Adapter, plain, save_lora
from .prediction import EDMPreconditioned
from .schedule import EDM, VP, RectifiedFlow
from .second_time import folded
from .teacher import Teacher
from .verify import verify


def export(generator: Generator, teacher: Teacher, folder: Path, dtype: torch.dtype, card: Card) -> Path:
    """Write `generator` to `folder` as the teacher's own pipeline class and return the folder.

    `pipe(..., num_inference_steps=len(generator.times))` is then the generator, pictures equal to TOLERANCE in float32;
    with the other numbers of `step_counts` it is that part of the chain, which is compared as well.
    A half-precision export is compared twice: its rounded weights in float32 arithmetic to TOLERANCE, and as users run
    it to HALF_TOLERANCE. An earlier export there is replaced once the new one is complete; generator and teacher are
    left as they are. Raises ValueError where no stock pipeline can express the generator, where its pictures are not
    finite or too coarse in `dtype`, and where the folder cannot be written; RuntimeError where the comparison fails.
    """
    check_input_scale(generator, teacher)
    scheduler = scheduler_for(generator, teacher)
    counts = step_counts(scheduler, generator, teacher)
    try:
        with replacing(folder) as scratch:
            network = stored_network(generator.denoiser.network, dtype)
            save_stock(network, teacher, scheduler, dtype, scratch)
            if teacher.remote_code:
                from .networks.standalone import make_standalone

                make_standalone(scratch, teacher.network_name)
            text = card_text(card, generator, teacher, folder.resolve().name, dtype, counts)
            (scratch / "README.md").write_text(text, encoding="utf-8")
            verify(scratch, network, generator, teacher, dtype, counts, card.guidance)
    except OSError as error:
        raise ValueError(
            f"the export cannot be written to {folder}: {error.strerror or error}; name a folder that is writable"
        ) from error
    return folder


def export_lora(generator: Generator, teacher: Teacher, folder: Path, layout: str, dtype: torch.dtype) -> Path:
    """Write the student's adapter and the scheduler that goes with it, for a pipeline that has the teacher's weights.

    `layout` is one of `onestep.lora.FORMATS`. Raises ValueError for a student that is no adapter, for a layout that its
    network cannot have, and for a folder that cannot be written.
    """
    adapter = unwrap(generator.denoiser.network)
    if not isinstance(adapter, Adapter):
        raise ValueError("this student is no adapter: leave --lora out to export it as a full model")
    if teacher.remote_code:
        raise ValueError("diffusers reads no LoRA file for this network: leave --lora out to export it as a full model")
    check_input_scale(generator, teacher)
    scheduler = scheduler_for(generator, teacher)
    with replacing(folder, LORA_NAME) as scratch:
        save_lora(adapter, scratch / LORA_NAME, layout, dtype)
        scheduler.save_pretrained(scratch / "scheduler")
    return folder


def check_input_scale(generator: Generator, teacher: Teacher) -> None:
    """Raises ValueError where the stock pipeline starts from noise of another standard deviation than the generator."""
    _, sigma_t = generator.denoiser.schedule.coefficients(generator.time(0, torch.zeros(1)))
    stock = 1.0 if teacher.export_scale == "unit" else float(sigma_t)
    if not math.isclose(generator.input_scale, stock, rel_tol=1e-6):
        raise ValueError(
            f"input_scale {generator.input_scale:g} cannot be exported: the stock {type(teacher.pipeline).__name__} "
            f"starts from {stock:g} * N(0, 1); train with --input-scale {teacher.export_scale} (or auto)"
        )


def scheduler_for(generator: Generator, teacher: Teacher) -> Any:
    """The scheduler with which a pipeline of the teacher's class, asked for len(generator.times) steps, visits these times.

    Raises ValueError where no scheduler does.
    """
    schedule, prediction = generator.denoiser.schedule, generator.denoiser.prediction
    if isinstance(schedule, VP):
        return _vp_scheduler(generator, teacher.pipeline.scheduler.betas)
    if isinstance(schedule, EDM) and isinstance(prediction, EDMPreconditioned):
        return _edm_scheduler(generator, teacher, prediction.sigma_data)
    if isinstance(schedule, RectifiedFlow):
        return _flow_scheduler(generator, teacher, schedule.num_train_timesteps)
    raise ValueError(
        f"no stock scheduler is known for {type(schedule).__name__} with {prediction.name}; allowed are VP, EDM with "
        "preconditioning, and RectifiedFlow"
    )


def step_counts(scheduler: Any, generator: Generator, teacher: Teacher) -> list[int]:
    """The numbers of steps with which the exported pipeline is the chain or an even part of it, see `part_of`."""
    length = len(generator.times)
    divisors = [steps for steps in range(1, length + 1) if length % steps == 0]
    return [steps for steps in divisors if _visits(scheduler, teacher, part_of(generator.times, steps))]


def _visits(scheduler: Any, teacher: Teacher, times: list[float]) -> bool:
    """Whether the stock pipeline with this scheduler visits these times where it is asked for so many steps."""
    with np.errstate(invalid="ignore"):  # a flow's times cannot be stretched where there is but one: NaN
        scheduler.set_timesteps(len(times), **teacher.spacing(len(times)))
    found = scheduler.timesteps if isinstance(teacher.denoiser.schedule, VP) else scheduler.sigmas[:-1]
    return len(found) == len(times) and torch.allclose(found.double(), torch.tensor(times).double(), rtol=1e-6, atol=0)


def _vp_scheduler(generator: Generator, betas: Tensor) -> Any:
    """DDIM for one step, LCM for a chain, on the teacher's noise levels up to the first time alone.

    Euler schedulers are never right here: they start from sigma/alpha * N(0, 1) where the student gets N(0, 1).
    """
    from diffusers import DDIMScheduler, LCMScheduler

    times = generator.times
    levels = int(times[0]) + 1
    shared = {
        "num_train_timesteps": levels,
        "trained_betas": betas[:levels].tolist(),
        "prediction_type": generator.denoiser.prediction.name,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # neither spacing reads it, but Stable Diffusion's pipeline deprecates 0 at every loading
    }
    if len(times) == 1:
        return DDIMScheduler(timestep_spacing="trailing", **shared)
    for original_steps in (n for n in range(len(times), levels + 1) if levels % n == 0):
        # LCM mixes 0.25 / (timestep_scaling t)^2 of x_t into x0: at 1e4 that vanishes in float32
        scheduler: Any = LCMScheduler(original_inference_steps=original_steps, timestep_scaling=1e4, **shared)
        scheduler.set_timesteps(len(times))
        if scheduler.timesteps.tolist() == times:
            return scheduler
    allowed = ", ".join(str(n) for n in range(1, 17) if levels % n == 0)
    raise ValueError(
        f"LCMScheduler cannot visit the times {times}; train with --student-steps at one of {allowed} (the divisors of "
        f"{levels}), or with another --init-rho"
    )


def _edm_scheduler(generator: Generator, teacher: Teacher, sigma_data: float) -> Any:
    """sigma_min = 0 makes the boundary scalings EDM's own; n + 1 levels make n steps those of `EDM.chain`."""
    from diffusers import CMStochasticIterativeScheduler

    times = generator.times
    scheduler: Any = CMStochasticIterativeScheduler(
        num_train_timesteps=len(times) + 1,
        sigma_min=0.0,
        sigma_max=times[0],
        sigma_data=sigma_data,
        rho=EDM.CHAIN_RHO,
        clip_denoised=False,
    )
    if not _visits(scheduler, teacher, times):
        raise ValueError(
            f"CMStochasticIterativeScheduler cannot visit the sigmas {times}; allowed are those of a chain, here "
            f"{EDM().chain(times[0], len(times))}: train with --student-steps and leave the times to it"
        )
    return scheduler


def _flow_scheduler(generator: Generator, teacher: Teacher, num_train_timesteps: int) -> Any:
    """Stochastic sampling re-noises x0 = x - t v as the chain does; a single Euler step from 1 to 0 is x0.

    Where the pipeline leaves the times to the scheduler, they are n even ones from 1 to 1 / N, which `shift_terminal`
    stretches to end at 1 / n. With another number of steps that end stays where it is.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    times = generator.times
    chain: dict[str, Any] = {"stochastic_sampling": True} if len(times) > 1 else {}
    if chain and not teacher.spacing(len(times)):
        chain["shift_terminal"] = 1 / len(times)
    # shift 1 leaves even times even, and a dynamic one is off
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, **chain)
    if not _visits(scheduler, teacher, times):
        raise ValueError(
            f"FlowMatchEulerDiscreteScheduler cannot visit the times {times}; allowed are steps of equal size from 1 down "
            f"to {1 / len(times):g}: train with --init-rho none, and leave the times to --student-steps"
        )
    return scheduler


def _stock_pipeline(network: nn.Module, teacher: Teacher, scheduler: Any, dtype: torch.dtype) -> Any:
    """A new pipeline of the teacher's class around `network`, on the CPU with all weights in `dtype`."""
    parts = dict(teacher.pipeline.components) | {"scheduler": scheduler}
    for name, part in teacher.pipeline.components.items():
        if name == teacher.network_name:
            parts[name] = network
        elif isinstance(part, nn.Module):
            same = all(p.dtype == dtype and p.device.type == "cpu" for p in part.parameters())
            parts[name] = part if same else nn.Module.to(copy.deepcopy(part), "cpu", dtype)
    kind = type(teacher.pipeline)
    settings = {key: value for key, value in teacher.pipeline.config.items() if key in signature(kind).parameters}
    pipeline: Any = kind(**settings | parts)
    teacher.complete(pipeline)
    return pipeline


def save_stock(network: nn.Module, teacher: Teacher, scheduler: Any, dtype: torch.dtype, folder: Path) -> None:
    """That pipeline in `folder`, which does not say where the teacher lay on this disk, as diffusers would note."""
    _stock_pipeline(network, teacher, scheduler, dtype).save_pretrained(folder)
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stored_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network on the CPU in `dtype`; an adapter's is its base with the adapter merged. A second time becomes 0."""
    bare = unwrap(network)
    adapter = bare.name if isinstance(bare, Adapter) else None
    return plain(folded(body(bare)), dtype, "cpu", adapter).eval()


@contextmanager
def replacing(folder: Path, mark: str = "model_index.json") -> Iterator[Path]:
    """A sibling of `folder` to write into, which takes its place at the end and vanishes where anything fails.

    Raises ValueError where `folder` is something else than an earlier export, which has a file `mark`, or an empty folder.
    """
    target = folder.resolve()
    scratch, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not target.exists():
        old.rename(target)  # an earlier replacement was cut off between its two renames
    is_export = (target / mark).is_file()
    if target.exists() and not is_export and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{folder} exists and is no earlier export, so it is not replaced; name another folder")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in (each for each in scratch.rglob("*") if each.is_file()):
            fsync(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        try:
            scratch.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
