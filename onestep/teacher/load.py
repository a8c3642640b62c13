"""Loading a teacher, by the class of its pipeline."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..pipelines.adapter_guidance import SUBFOLDER, GuidanceAdapter
from ..quiet import quiet
from .base import Teacher
from .table import facts_of

NETWORKS = "onestep.networks"
"""The package whose classes a folder may name, beside those of diffusers and transformers."""
FAMILIES: dict[str, str] = {
    "ConsistencyModelPipeline": "pixel:EDMTeacher",
    "DDPMPipeline": "pixel:DDPMTeacher",
    "DiTPipeline": "dit:DiTTeacher",
    "FluxPipeline": "flux:FluxTeacher",
    "PixArtAlphaPipeline": "pixart:PixArtTeacher",
    "PixArtSigmaPipeline": "pixart:PixArtTeacher",
    "SanaPipeline": "pixart:SanaTeacher",
    "StableDiffusion3Pipeline": "stable_diffusion:SD3Teacher",
    "StableDiffusionPipeline": "stable_diffusion:SDTeacher",
    "StableDiffusionXLPipeline": "stable_diffusion:SDXLTeacher",
}


def family_named(pipeline: str) -> type[Teacher]:
    """The class of teacher for a class of pipeline. Raises ValueError for one that is not in the table."""
    if pipeline not in FAMILIES:
        raise ValueError(f"a {pipeline} is not supported as a teacher; allowed are {', '.join(FAMILIES)}")
    module, name = FAMILIES[pipeline].split(":")
    return getattr(import_module(f".{module}", __package__), name)


def load_teacher(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    resolution: int | None = None,
    cache: Path | None = None,
) -> Teacher:
    """The teacher of that short name, diffusers folder, EDM pickle or hub id. Raises ValueError where it cannot be had.

    EDM pickles are downloaded to and imported in `cache`, by default TrainConfig's.
    """
    facts = facts_of(name)
    source = facts.source
    if source.endswith(".pkl"):
        from ..networks.fetch import imported

        source = str(imported(source, cache or TrainConfig().cache_folder))
    pipeline, family = _load(name, source, dtype)
    pipeline.set_progress_bar_config(disable=True)
    try:
        teacher = family(pipeline, facts, resolution or facts.resolution)
    except ValueError as error:
        raise ValueError(f"the teacher {name!r} cannot be used: {error}") from error
    _compare(name, teacher)
    if (Path(source) / SUBFOLDER).is_dir():
        teacher.adopt(GuidanceAdapter.from_pretrained(source, subfolder=SUBFOLDER))
    return teacher.to(device)


def _load(name: str, source: str, dtype: torch.dtype) -> tuple[Any, type[Teacher]]:
    from diffusers import DiffusionPipeline

    try:
        with quiet():
            # the class first: what is not supported is not downloaded
            index = DiffusionPipeline.load_config(source)
            family = family_named(str(index.get("_class_name")))
            if any(str(part[0]).startswith(NETWORKS) for part in index.values() if isinstance(part, list)):
                import_module(NETWORKS)  # diffusers imports no module that a folder names
            return DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, **family.load_arguments), family
    except Exception as error:
        raise ValueError(
            f"the teacher {name!r} could not be loaded from {source}: {' '.join(str(error).split())}. "
            "Allowed is a complete diffusers folder or a hub id that this machine can reach"
        ) from error


def _compare(name: str, teacher: Teacher) -> None:
    """Raises ValueError where the loaded pipeline is not what the table knows under this name."""
    facts = teacher.facts
    known = {"prediction": facts.prediction, "latent_scale": facts.latent_scale, "latent_shift": facts.latent_shift}
    found = {"prediction": teacher.denoiser.prediction.name, **teacher.latent_units()}
    for key, value in known.items():
        if value is not None and value != found[key]:
            raise ValueError(
                f"the teacher {name!r} has {key} {found[key]} in {facts.source} where {value} is known to be right; "
                "download it again, or name your own folder with --teacher FOLDER"
            )
