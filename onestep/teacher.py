"""Teachers: frozen diffusers pipelines seen as denoisers, and the table of those known by name.

A new family of pipelines is a subclass of `Teacher` and a line in FAMILIES; a new checkpoint is a line in TEACHERS.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Cond, Denoiser, stack
from .prediction import prediction_of
from .schedule import Schedule

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Facts:
    """What is known of a teacher beside its weights; the middle of the precedence: method < facts < recipe < flags."""

    source: str
    """A diffusers folder or a hub id."""
    guidance: float = 1.0
    """Classifier-free guidance it is sampled with, in out = uncond + guidance * (cond - uncond)."""
    steps: int = 50
    """Steps it is sampled with."""
    licence: str = "unknown"
    protocol: str | None = None
    """The protocol in `onestep.metrics` that scores it without further files."""
    train: dict[str, Any] = field(default_factory=dict)
    """Training options that differ from the method's own defaults."""


TEACHERS: dict[str, Facts] = {
    "fashion": Facts(
        source=str(ASSETS / "fashion"),
        guidance=1.5,
        licence="Apache-2.0; trained on Fashion-MNIST (MIT)",
        protocol="fashion-10k",
        train={
            "data": "fashion",
            "init_rho": 2.5,
            "iterations": 1200,
            "lr": 1e-4,
            "critic_lr": 3e-4,
            "warmup": 30,
            "ema": 0.98,
            "ratio": 3,
            "gan": 1e-2,
        },
    ),
    "digits": Facts(
        source=str(ASSETS / "digits"),
        steps=18,
        licence="Apache-2.0; trained on the UCI digits of scikit-learn (CC-BY-4.0)",
        train={"data": "digits", "init_rho": 2.5, "guidance": 1.0},
    ),
}


class Teacher(ABC):
    """A frozen denoiser with the pipeline it came from: x0 = teacher(x_t, t, cond, uncond, guidance)."""

    network_name: str
    """Attribute of the pipeline that holds the network."""
    export_scale: str
    """"unit" where the stock pipeline starts from N(0, 1), "sigma" where from N(0, sigma^2), at its first time."""
    seeded_chain: bool
    """Whether the stock pipeline draws a chain's later noises, like the first, from the generators it is given."""

    def __init__(self, pipeline: Any, facts: Facts):
        self.pipeline, self.facts = pipeline, facts
        network = getattr(pipeline, self.network_name).eval().requires_grad_(False)
        self.denoiser = self._denoiser(network)

    def _denoiser(self, network: nn.Module) -> Denoiser:
        scheduler = self.pipeline.scheduler
        return Denoiser(network, Schedule.from_scheduler(scheduler), prediction_of(scheduler), taps=self.taps(network))

    def copy(self) -> Denoiser:
        """A trainable copy of the denoiser. It stays in eval mode: distillation runs without dropout, as DMD2 does."""
        return self._denoiser(copy.deepcopy(self.denoiser.network).requires_grad_(True))

    def to(self, device: torch.device | str) -> "Teacher":
        self.pipeline.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.network.parameters()).device

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond | None = None, guidance: float = 1.0) -> Tensor:
        """Guided x0 = x0_uncond + guidance * (x0_cond - x0_uncond), one pass over the doubled batch; shape of x_t.

        Raises ValueError where guidance is asked of a teacher without an unconditional branch.
        """
        if guidance == 1.0:
            return self.denoiser(x_t, t, cond)
        if uncond is None:
            raise ValueError("this teacher has no unconditional branch; only --guidance 1 is possible")
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), stack(cond, uncond))
        x_cond, x_uncond = both.chunk(2)
        return x_uncond + guidance * (x_cond - x_uncond)

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Cond, uncond: Cond | None, guidance: float, steps: int) -> Tensor:
        """x0 by `steps` DDIM steps from unit noise z: x_s = alpha_s x0 + sigma_s eps (Song et al. 2021, eq. 12, eta 0)."""
        schedule = self.denoiser.schedule
        grid = schedule.grid(steps)
        x_t = schedule.init_sigma * z
        kind = torch.long if isinstance(grid[0], int) else z.dtype
        x_0 = x_t
        for here, after in zip(grid, [*grid[1:], None]):
            t = torch.full((len(z),), here, device=z.device, dtype=kind)
            x_0 = self(x_t, t, cond, uncond, guidance)
            if after is not None:
                (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t, z), schedule(torch.full_like(t, after), z)
                x_t = alpha_s * x_0 + sigma_s * (x_t - alpha_t * x_0) / sigma_t
        return x_0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one x0, without the batch."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """(channels, side) of the pictures it makes."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes it is conditioned on."""

    @abstractmethod
    def taps(self, network: nn.Module) -> list[str]:
        """Names of the submodules whose outputs a discriminator reads."""

    @abstractmethod
    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        """(cond, uncond) for a batch of conditions: class labels, shape (B,)."""

    def arguments(self, labels: list[int]) -> dict[str, Any]:
        """What the stock pipeline is called with for plain conditional pictures of these classes."""
        return {"class_labels": labels}

    def complete(self, pipeline: Any) -> None:
        """Note in a new pipeline of this family what its class would lose when it is saved; by default nothing."""
        return None

    @abstractmethod
    def to_x0(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to x0 units: VAE latents, or the pixels themselves."""

    @abstractmethod
    def to_images(self, x_0: Tensor) -> Tensor:
        """x0 to images (B, C, H, W) in [0, 1]."""


class DiTTeacher(Teacher):
    """diffusers' DiTPipeline (Peebles & Xie 2023): class labels, latents, null class 1000."""

    network_name = "transformer"
    export_scale = "unit"
    seeded_chain = False

    @property
    def shape(self) -> tuple[int, ...]:
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def image_shape(self) -> tuple[int, int]:
        vae = self.pipeline.vae.config
        return vae.out_channels, self.shape[-1] * 2 ** (len(vae.block_out_channels) - 1)

    @property
    def classes(self) -> int:
        return len(self.pipeline.labels) or self.pipeline.transformer.config.num_embeds_ada_norm

    def taps(self, network: Any) -> list[str]:
        return [f"transformer_blocks.{(len(network.transformer_blocks) - 1) // 2}"]

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        return {"class_labels": conditions}, {"class_labels": torch.full_like(conditions, 1000)}

    def arguments(self, labels: list[int]) -> dict[str, Any]:
        return {"class_labels": labels, "guidance_scale": 1}

    def complete(self, pipeline: Any) -> None:
        # the class keeps its names as {name: id}, and loses them when it is saved unless its config has them
        names: dict[int, list[str]] = {}
        for name, index in self.pipeline.labels.items():
            names.setdefault(index, []).append(name)
        if names:
            pipeline.register_to_config(id2label={index: ", ".join(each) for index, each in sorted(names.items())})

    @torch.no_grad()
    def to_x0(self, images: Tensor) -> Tensor:
        return self.pipeline.vae.encode(images).latent_dist.mode() * self.pipeline.vae.config.scaling_factor

    @torch.no_grad()
    def to_images(self, x_0: Tensor) -> Tensor:
        pixels = self.pipeline.vae.decode(x_0 / self.pipeline.vae.config.scaling_factor).sample
        return (pixels / 2 + 0.5).clamp(0, 1)


class EDMTeacher(Teacher):
    """A UNet2DModel with EDM preconditioning in diffusers' ConsistencyModelPipeline: pixels, optional class labels."""

    network_name = "unet"
    export_scale = "sigma"
    seeded_chain = True

    @property
    def shape(self) -> tuple[int, ...]:
        config = self.pipeline.unet.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.shape[0], self.shape[-1]

    @property
    def classes(self) -> int:
        return self.pipeline.unet.config.num_class_embeds or 1

    def taps(self, network: nn.Module) -> list[str]:
        return ["mid_block"]

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        if self.pipeline.unet.config.num_class_embeds is None:
            return {}, None
        return {"class_labels": conditions}, None

    def arguments(self, labels: list[int]) -> dict[str, Any]:
        cond, _ = self.encode(torch.tensor(labels))
        return ({"class_labels": labels} if cond else {}) | {"batch_size": len(labels)}

    def to_x0(self, images: Tensor) -> Tensor:
        return images

    def to_images(self, x_0: Tensor) -> Tensor:
        return (x_0 / 2 + 0.5).clamp(0, 1)


FAMILIES: dict[str, type[Teacher]] = {
    "DiTPipeline": DiTTeacher,
    "ConsistencyModelPipeline": EDMTeacher,
}


def facts_of(name: str) -> Facts:
    """The table's entry for a short name, or bare facts for a diffusers folder or hub id. Raises ValueError otherwise."""
    if name in TEACHERS:
        return TEACHERS[name]
    if (Path(name) / "model_index.json").is_file():
        return Facts(source=name)
    looks_local = name.startswith((".", "/", "~")) or Path(name).exists() or name.count("/") != 1
    if looks_local:
        near = get_close_matches(name, TEACHERS, 1)
        hint = f"; did you mean --teacher {near[0]}?" if near else ""
        raise ValueError(
            f"no teacher {name!r}: it is neither a known name ({', '.join(TEACHERS)}), nor a folder with a "
            f"model_index.json, nor a hub id like owner/name{hint}"
        )
    return Facts(source=name)


def load_teacher(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Teacher:
    """The teacher of that short name, diffusers folder or hub id. Raises ValueError where it cannot be had."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    facts = facts_of(name)
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # its bars and warnings would hide the one line that matters
    logging.set_verbosity(logging.CRITICAL)
    try:
        pipeline = DiffusionPipeline.from_pretrained(facts.source).to(dtype)
    except Exception as error:
        raise ValueError(
            f"the teacher {name!r} could not be loaded from {facts.source}: {error}. "
            "Allowed is a complete diffusers folder or a hub id that this machine can reach"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    family = FAMILIES.get(type(pipeline).__name__)
    if family is None:
        raise ValueError(
            f"{name!r} is a {type(pipeline).__name__}, which is not supported; allowed are {', '.join(FAMILIES)}"
        )
    pipeline.set_progress_bar_config(disable=True)
    return family(pipeline, facts).to(device)
