"""A generator as a stock diffusers folder: plain diffusers makes its pictures, without onestep or magic numbers.

The folder holds the student's network, a diffusers scheduler whose own timesteps are the student's, the teacher's other
parts and a model card. It is reloaded and its pictures are compared with the generator's before it takes its name.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from .denoiser import Denoiser, unwrap
from .generator import Generator
from .metrics.render import family_of, load_pipeline
from .prediction import EDMPreconditioned
from .schedule import EDM, VP, RectifiedFlow
from .teacher import Teacher

TOLERANCE = 1e-5
"""Largest deviation of a picture in [0, 1] in float32, for sigma/alpha up to 10 at the first step. Beyond, it grows in
proportion, to 2e-4 at most: x0 = (x_t - sigma eps) / alpha multiplies float32's own rounding by sigma/alpha."""
HALF_TOLERANCE = 0.03
"""Largest mean deviation of a picture in [0, 1] when the folder is run in fp16 or bf16, where rounding dominates."""
SEEDS = (0, 1, 2, 3)
SCORE = ("<!-- score -->\n", "<!-- /score -->\n")
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "openrail++", "unknown"}
"""Values that the front matter of a model card may name; anything else is "other"."""


@dataclass(frozen=True)
class Card:
    """What the model card says beside what the export itself knows."""

    method: str
    teacher: str
    guidance: float
    """The teacher's, in out = uncond + guidance * (cond - uncond)."""
    licence: str
    """The teacher's."""
    config: Mapping[str, Any]
    """Every resolved training option."""
    score: Mapping[str, Any] | None = None
    """A row of `onestep.metrics.evaluate`."""
    command: str = ""
    """What was typed to train it."""


def export(generator: Generator, teacher: Teacher, folder: Path, dtype: torch.dtype, card: Card) -> Path:
    """Write `generator` to `folder` as the teacher's own pipeline class and return the folder.

    `pipe(..., num_inference_steps=len(generator.times))` is then the generator, pictures equal to TOLERANCE in float32.
    A half-precision export is compared twice: its rounded weights in float32 arithmetic to TOLERANCE, and as users run
    it to HALF_TOLERANCE. An earlier export there is replaced once the new one is complete; generator and teacher are
    left as they are. Raises ValueError where no stock pipeline can express the generator, where its pictures are not
    finite or too coarse in `dtype`, and where the folder cannot be written; RuntimeError where the comparison fails.
    """
    check_input_scale(generator, teacher)
    scheduler = scheduler_for(generator, teacher.pipeline.scheduler)
    rounded = _stock_pipeline(generator, teacher, scheduler, dtype)
    try:
        with _replacing(folder) as scratch:
            stored = copy.deepcopy(rounded)
            for part in _modules(stored).values():
                nn.Module.to(part, dtype)
            stored.save_pretrained(scratch)
            for path in [scratch / "model_index.json", *scratch.glob("*/config.json")]:
                config = json.loads(path.read_text(encoding="utf-8"))
                config.pop("_name_or_path", None)  # diffusers notes where the teacher lay on this disk
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            text = _card_text(card, generator, teacher, folder.resolve().name, dtype)
            (scratch / "README.md").write_text(text, encoding="utf-8")
            _verify(scratch, generator, type(teacher)(rounded, teacher.facts), dtype)
    except OSError as error:
        raise ValueError(
            f"the export cannot be written to {folder}: {error.strerror or error}; name a folder that is writable"
        ) from error
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


def scheduler_for(generator: Generator, original: Any) -> Any:
    """The diffusers scheduler that visits generator.times by itself for num_inference_steps = len(generator.times).

    `original` is the teacher's scheduler. Raises ValueError where no scheduler visits these times.
    """
    schedule, times = generator.denoiser.schedule, generator.times
    if isinstance(schedule, VP):
        return _vp_scheduler(generator, original.betas)
    if isinstance(schedule, EDM) and isinstance(generator.denoiser.prediction, EDMPreconditioned):
        return _edm_scheduler(times, generator.denoiser.prediction.sigma_data)
    if isinstance(schedule, RectifiedFlow):
        if times != [1.0]:
            raise ValueError(
                f"FlowMatchEulerDiscreteScheduler starts at time 1, not at {times}; train with --student-steps 1 and "
                "--init-rho none"
            )
        from diffusers import FlowMatchEulerDiscreteScheduler

        # x + (0 - 1) v: the shift leaves the times 0 and 1 where they are
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.num_train_timesteps)
    raise ValueError(
        f"no stock scheduler is known for {type(schedule).__name__} with {generator.denoiser.prediction.name}; allowed "
        "are VP, EDM with preconditioning, and RectifiedFlow"
    )


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


def _edm_scheduler(times: list[float], sigma_data: float) -> Any:
    """sigma_min = 0 makes the boundary scalings EDM's own; rho = 1 over n + 1 levels makes n steps evenly spaced."""
    from diffusers import CMStochasticIterativeScheduler

    scheduler: Any = CMStochasticIterativeScheduler(
        num_train_timesteps=len(times) + 1,
        sigma_min=0.0,
        sigma_max=times[0],
        sigma_data=sigma_data,
        rho=1.0,
        clip_denoised=False,
    )
    scheduler.set_timesteps(len(times))
    if not torch.allclose(scheduler.sigmas[:-1], torch.tensor(times), rtol=1e-6, atol=0):
        raise ValueError(
            f"CMStochasticIterativeScheduler cannot visit the sigmas {times}; allowed are steps of equal size down to "
            f"{times[0] / len(times):g}: train with --student-steps and leave the times to it"
        )
    return scheduler


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _stock_pipeline(generator: Generator, teacher: Teacher, scheduler: Any, dtype: torch.dtype) -> Any:
    """A new pipeline of the teacher's class on the CPU, in float32, its weights rounded to what `dtype` can hold."""
    parts = dict(teacher.pipeline.components) | {"scheduler": scheduler}
    for name, part in _modules(teacher.pipeline).items():
        source: Any = unwrap(generator.denoiser.network) if name == teacher.network_name else part
        with torch.random.fork_rng(devices=[]):
            # made anew, not copied: buffers that no file holds are then as exact as in a reloaded network
            fresh = type(source).from_config(source.config)
        fresh.load_state_dict({key: value.to("cpu", dtype) for key, value in source.state_dict().items()})
        parts[name] = fresh.eval()
    pipeline: Any = type(teacher.pipeline)(**parts)
    if type(pipeline).__name__ == "DiTPipeline":
        # a DiTPipeline keeps its class names as {name: id}, and loses them when it is saved unless its config has them
        names: dict[int, list[str]] = {}
        for name, index in teacher.pipeline.labels.items():
            names.setdefault(index, []).append(name)
        if names:
            pipeline.register_to_config(id2label={index: ", ".join(each) for index, each in sorted(names.items())})
    return pipeline


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A sibling of `folder` to write into, which takes its place at the end and vanishes where anything fails.

    Raises ValueError where `folder` is something else than an earlier export or an empty folder.
    """
    target = folder.resolve()
    scratch, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not target.exists():
        old.rename(target)  # an earlier replacement was cut off between its two renames
    is_export = (target / "model_index.json").is_file()
    if target.exists() and not is_export and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{folder} exists and is no diffusers folder, so it is not replaced; name another folder")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in (each for each in scratch.rglob("*") if each.is_file()):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
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


def _verify(folder: Path, generator: Generator, teacher: Teacher, dtype: torch.dtype) -> None:
    """Compare the reloaded folder with the generator on the weights of `teacher`, which holds the export in float32."""
    live = generator.denoiser
    student = Denoiser(teacher.denoiser.network, live.schedule, live.prediction, live.call)
    reference = Generator(student, generator.times, generator.input_scale)
    alpha_t, sigma_t = live.schedule.coefficients(generator.time(0, torch.zeros(1)))
    rho = float(sigma_t / alpha_t) if isinstance(live.schedule, VP) else 1.0
    for arithmetic in dict.fromkeys((torch.float32, dtype)):
        want = _own_pictures(reference, teacher, arithmetic)
        error = (_stock_pictures(folder, teacher, len(generator.times), arithmetic) - want).abs()
        if not want.isfinite().all():
            raise ValueError("the student makes pictures with NaN or infinity: export an earlier checkpoint")
        if arithmetic == torch.float32 and not error.max() <= TOLERANCE * min(max(1.0, rho / 10), 20.0):
            raise RuntimeError(f"the exported folder deviates from the generator by {error.max():.3g}, so it is dropped")
        if not error.mean() <= HALF_TOLERANCE:
            raise ValueError(
                f"in {arithmetic} the exported pictures deviate by {error.mean():.3g} on average, more than "
                f"{HALF_TOLERANCE}; type --export-dtype fp32"
            )


def _stock_pictures(folder: Path, teacher: Teacher, steps: int, dtype: torch.dtype) -> Tensor:
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
def _own_pictures(generator: Generator, teacher: Teacher, dtype: torch.dtype) -> Tensor:
    """The generator's pictures from the noise that `_stock_pictures` sees, drawn in `dtype`, computed in float32."""
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def draw() -> Tensor:
        return torch.cat([torch.randn((1, *teacher.shape), generator=each, dtype=dtype) for each in sources]).float()

    z, count = draw(), len(generator.times) - 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEEDS[0])
        if type(teacher.pipeline).__name__ == "DiTPipeline":  # it hands its generators to the first noise alone
            noises = [torch.randn(z.shape, dtype=dtype).float() for _ in range(count)]
        else:
            noises = [draw() for _ in range(count)]
    cond, _ = teacher.encode(torch.tensor([seed % teacher.classes for seed in SEEDS]))
    return teacher.to_images(generator(z, cond, noises)).float()


def snippet(teacher: Teacher, folder: str | Path, steps: int = 1, dtype: torch.dtype = torch.float32) -> str:
    """Five lines of Python that load an export of a student of `teacher`, make pictures and save one of them."""
    pipeline = type(teacher.pipeline).__name__
    labels = list(range(min(4, teacher.classes)))
    cond, _ = teacher.encode(torch.tensor(labels))
    given = [f"class_labels={labels}"] if cond else []
    given += ["guidance_scale=1"] if pipeline == "DiTPipeline" else [f"batch_size={len(labels)}"]
    given += [f"num_inference_steps={steps}", "generator=torch.Generator().manual_seed(0)"]
    return "\n".join(
        (
            "import torch",
            f"from diffusers import {pipeline}",
            f"pipe = {pipeline}.from_pretrained({json.dumps(str(folder))}, torch_dtype={dtype})",
            f"images = pipe({', '.join(given)}).images",
            'images[0].save("picture.png")',
        )
    )


def _card_text(card: Card, generator: Generator, teacher: Teacher, name: str, dtype: torch.dtype) -> str:
    """README.md of the folder."""
    identifier = card.licence.split(";")[0].strip().lower()
    known = identifier in LICENCES
    licence = {"license": identifier} if known else {"license": "other", "license_name": card.licence}
    front = {**licence, "library_name": "diffusers", "tags": ["diffusion", "distillation", "one-step", card.method]}
    steps = len(generator.times)
    config = yaml.safe_dump(dict(card.config), sort_keys=False)
    trained = f"\nTrained with\n\n```bash\n{card.command}\n```\n" if card.command else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

{card.teacher}, distilled with {card.method} into a generator of {steps} network call{"s" * (steps > 1)} an image.

```python
{snippet(teacher, name, steps, dtype)}
```

| | |
|---|---|
| Teacher | {card.teacher}, guidance {card.guidance:g} (`uncond + guidance * (cond - uncond)`) |
| Licence of the teacher | {card.licence} |
| Method | {card.method} |
| Steps | {steps}, at {", ".join(f"{t:g}" for t in generator.times)}; other numbers of steps were not trained |
| Guidance | built in; do not add any |
| Weights | {str(dtype).removeprefix("torch.")} |

## Score

{_score_text(card.score)}{trained}
<details><summary>Every training option</summary>

```yaml
{config}```

</details>
"""


def _score_text(row: Mapping[str, Any] | None) -> str:
    """The card's score between its marks: one line an entry of the row, nested entries as JSON."""
    if row is None:
        return "not scored\n".join(SCORE)
    # the path that the export had while it was scored says nothing to its users
    shown = {key: value for key, value in row.items() if key != "export"}
    lines = [f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |\n" for key, value in shown.items()]
    return ("| | |\n|---|---|\n" + "".join(lines)).join(SCORE)


def update_score(folder: Path, row: Mapping[str, Any]) -> None:
    """Put a row of `onestep.metrics.evaluate` into the card of an exported folder; the file is replaced in one move.

    Raises ValueError where the folder has no such card.
    """
    path, (opening, closing) = folder / "README.md", SCORE
    try:
        before, _, rest = path.read_text(encoding="utf-8").partition(opening)
        _, mark, after = rest.partition(closing)
        if not mark:
            raise ValueError(f"{path} has no score to replace; export the folder again")
        partial = path.with_name(".README.md.partial")
        partial.write_text(before + _score_text(row) + after, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be rewritten: {error.strerror}; name a complete, writable export") from error
