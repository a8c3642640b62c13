"""Images from an exported folder, sampled by plain diffusers as a user of the folder would."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..quiet import quiet

Sample = Callable[[Any, list[Any], list[torch.Generator], int, float], Tensor]
"""(pipe, class labels or prompts, generators, steps, guidance) -> images (B, C, H, W) in [0, 1]."""


def _dit(pipe: Any, labels: list[int], generators: list[torch.Generator], steps: int, guidance: float) -> Tensor:
    with _seeded(pipe.scheduler, generators * (2 if guidance > 1 else 1)):  # it steps the doubled batch
        return _called(pipe, class_labels=labels, guidance_scale=guidance, generator=generators, num_inference_steps=steps)


def _called(pipe: Any, **arguments: Any) -> Tensor:
    return torch.from_numpy(pipe(**arguments, output_type="np").images).permute(0, 3, 1, 2)


@contextmanager
def _seeded(scheduler: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """A chain's later noises come from each image's generator too; DiTPipeline would take them from torch's global one."""
    step = scheduler.step
    if "generator" in signature(step).parameters:
        scheduler.step = partial(step, generator=generators)
    try:
        yield
    finally:
        scheduler.step = step


def _consistency(pipe: Any, labels: list[int], generators: list[torch.Generator], steps: int, guidance: float) -> Tensor:
    # "pt" comes in [0, 1] already: the pipeline's postprocess_image halves, shifts and clamps for every output type
    return pipe(
        batch_size=len(labels),
        class_labels=labels,
        generator=generators,
        num_inference_steps=steps,
        output_type="pt",
    ).images


def _text(pipe: Any, prompts: list[str], generators: list[torch.Generator], steps: int, guidance: float) -> Tensor:
    with _seeded(pipe.scheduler, generators):
        return _called(pipe, prompt=prompts, guidance_scale=guidance, generator=generators, num_inference_steps=steps)


def _unconditional(pipe: Any, labels: list[int], generators: list[torch.Generator], steps: int, guidance: float) -> Tensor:
    return _called(pipe, batch_size=len(labels), generator=generators, num_inference_steps=steps)


def _dit_classes(pipe: Any) -> int | None:
    # the size of its embedding says nothing: it is 1000 for ten classes too, the null class being number 1000
    return max(pipe.labels.values()) + 1 if pipe.labels else None


def _consistency_classes(pipe: Any) -> int | None:
    return pipe.unet.config.num_class_embeds or 1


@dataclass(frozen=True)
class Family:
    """How the pipelines of one class are sampled and what of them is scored."""

    sample: Sample
    network: str
    """The subfolder that holds the network; its weights are what a result row's hash stands for."""
    guided: bool
    """Whether the pipeline takes a guidance scale above 1, at the price of a second pass a step."""
    classes: Callable[[Any], int | None]
    """How many class labels the pipeline knows, None where its folder does not say; 1 where it is not conditional."""
    prompts: bool = False
    """Whether a condition is a text, and not a class label."""
    embedded: bool = False
    """Whether the guidance scale is an input of the network, which costs no second pass."""

    def passes(self, steps: int, guidance: float) -> int:
        """Evaluations of the network for one image."""
        return steps * (2 if self.guided and not self.embedded and guidance > 1 else 1)


def _texts(network: str, embedded: bool = False) -> Family:
    return Family(_text, network, guided=True, classes=lambda pipe: None, prompts=True, embedded=embedded)


FAMILIES: dict[str, Family] = {
    "DiTPipeline": Family(_dit, "transformer", guided=True, classes=_dit_classes),
    "ConsistencyModelPipeline": Family(_consistency, "unet", guided=False, classes=_consistency_classes),
    "DDPMPipeline": Family(_unconditional, "unet", guided=False, classes=lambda pipe: 1),
    "DDIMPipeline": Family(_unconditional, "unet", guided=False, classes=lambda pipe: 1),
    "StableDiffusionPipeline": _texts("unet"),
    "StableDiffusionXLPipeline": _texts("unet"),
    "LatentConsistencyModelPipeline": _texts("unet", embedded=True),
    "PixArtAlphaPipeline": _texts("transformer"),
    "PixArtSigmaPipeline": _texts("transformer"),
    "StableDiffusion3Pipeline": _texts("transformer"),
    "FluxPipeline": _texts("transformer", embedded=True),
    "SanaPipeline": _texts("transformer"),
}


def _family_named(name: Any) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"a {name} cannot be sampled here; allowed are {', '.join(FAMILIES)}: export as one of these")
    return FAMILIES[name]


def family_of(pipe: Any) -> Family:
    """The table's entry for a pipeline. Raises ValueError for a class that is not in it.

    Of several students it is that of the first one, sampled by the pipeline that sends each condition to its own.
    """
    if type(pipe).__name__ != SEVERAL:
        return _family_named(type(pipe).__name__)
    one = pipe.student(0)
    family = family_of(one)
    return replace(
        family,
        sample=partial(_by_students, "prompt" if family.prompts else "class_labels"),
        network=f"student-*/{family.network}",
        guided=False,
        classes=lambda pipe: family.classes(one),
    )


def _by_students(
    name: str, pipe: Any, conditions: list[Any], generators: list[torch.Generator], steps: int, guidance: float
) -> Tensor:
    if steps != 1:  # the noises between the steps would not come from the generators
        raise ValueError(f"--steps {steps} is not possible for several students, which are sampled in 1: leave it out")
    return _called(pipe, **{name: conditions}, generator=generators)


SEVERAL = "MultiStudentPipeline"
"""Of onestep/pipelines/multi_student.py, which an export brings along."""


def load_pipeline(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """The diffusers pipeline of a local folder, without onestep, the hub or pickles.

    Code that the folder brings along is run only where it is to be trusted.

    Raises ValueError where the folder is no complete diffusers folder of a known class.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is not an exported folder: it has no model_index.json; name a diffusers folder")
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}): export the folder again") from error
    several = isinstance(name, list) and name[-1:] == [SEVERAL]
    if several and not trust_remote_code:
        raise ValueError(f"{folder} is sampled by its own {name[0]}.py: read it, and type --trust-remote-code to run it")
    if not several:
        _family_named(str(name))
    from diffusers import DiffusionPipeline
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # transformers' own, which text encoders show
    try:
        with quiet():
            pipe = DiffusionPipeline.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # diffusers raises OSError, ValueError, SafetensorError, RuntimeError and more here
        raise ValueError(f"{folder} could not be loaded: {error}. Export the folder again") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if several:
        with quiet():  # all of them now, and not in the middle of the first images
            for number in range(pipe.config.students):
                pipe.student(number)
    pipe.set_progress_bar_config(disable=True)
    if "safety_checker" in pipe.components:  # it would have some of the images scored as black ones
        pipe.safety_checker = None
    with quiet():
        return pipe.to(device, dtype)


def render(
    pipe: Any,
    conditions: Sequence[Any],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch_size: int,
    quiet: bool = False,
) -> Iterator[Tensor]:
    """Images of the class or prompt conditions[i] from the noise of seeds[i], in batches (B, C, H, W), float32 on the CPU,
    in [0, 1].

    Each image has a CPU generator of its own, so that neither the batch size nor the device chooses its noise.
    guidance: out = uncond + guidance * (cond - uncond); 1 is the plain conditional.
    Arguments are checked at the call, images are made as the iterator is read. Raises ValueError for arguments that the
    pipeline cannot honour, and for images that are not finite.
    """
    family = family_of(pipe)
    if len(conditions) != len(seeds):
        raise ValueError(f"{len(conditions)} conditions for {len(seeds)} seeds; give one seed an image")
    for flag, value in (("--steps", steps), ("--batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{flag} {value} is not allowed; type {flag} 1 or more")
    # DiTPipeline takes any scale up to 1 as the plain conditional: refusing keeps the row's guidance true
    if guidance < 1 or (guidance != 1 and not family.guided):
        allowed = "1 and more" if family.guided else "1 alone, as the pipeline has no guidance"
        raise ValueError(f"--guidance {guidance} is not possible for {type(pipe).__name__}; allowed is {allowed}")
    pipe.set_progress_bar_config(disable=True)
    images = _batches(pipe, family.sample, list(conditions), list(seeds), steps, guidance, batch_size)
    return images if quiet else _counted(images, len(seeds))


def _counted(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    with tqdm(total=count, desc="sampling", unit="img", dynamic_ncols=True, disable=None) as bar:
        for images in batches:
            bar.update(len(images))
            yield images


def _batches(
    pipe: Any, sample: Sample, conditions: list[Any], seeds: list[int], steps: int, guidance: float, batch_size: int
) -> Iterator[Tensor]:
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        images = sample(pipe, conditions[part], generators, steps, guidance).float().cpu()
        if not images.isfinite().all():
            raise ValueError(f"the export makes images with NaN or infinity (seed {seeds[start]} or soon after)")
        yield images
