"""What a teacher is to the rest of the library: a frozen diffusers pipeline seen as a denoiser."""

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpointing import enable
from ..denoiser import Cond, Denoiser, body, call_network, guided
from ..guided import Guided, told
from ..lora import Adapter, plain, unused
from ..pipelines.adapter_guidance import GuidanceAdapter
from ..prediction import prediction_of
from ..schedule import Schedule
from .facts import Facts


@dataclass(frozen=True)
class Copies:
    """How the trainable copies of a teacher's network are made."""

    lora: frozenset[str] = frozenset()
    """Players that train a low-rank adapter on the teacher's own network; the others train all weights, in float32."""
    rank: int = 64
    targets: str | None = None
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""


class Teacher(ABC):
    """A frozen denoiser with the pipeline it came from: x0 = teacher(x_t, t, cond, uncond, guidance)."""

    conditioned_by: ClassVar[str] = "class"
    """What a condition is: "class" label, or the row of a "text" in a table of prompts."""
    schedules: ClassVar[type[Schedule]]
    """The kind of noise schedule that its networks are trained with."""
    network_name: ClassVar[str]
    """Attribute of the pipeline that holds the network."""
    tap_output: ClassVar[int] = 0
    """Which output of a tapped submodule is the picture, where it returns a tuple."""
    export_scale: ClassVar[str]
    """"unit" where the stock pipeline starts from N(0, 1), "sigma" where from N(0, sigma^2), at its first time."""
    seeded_chain: ClassVar[bool]
    """Whether the stock pipeline draws a chain's later noises, like the first, from the generators it is given."""

    unconditional: ClassVar[bool] = True
    """Whether it has an unconditional branch, which guidance takes: the second that `encode` returns is then not None."""
    any_resolution: ClassVar[bool] = False
    """Whether its pictures may have another side than the native one."""
    load_arguments: ClassVar[dict[str, Any]] = {}
    """What its pipeline is loaded with beside its folder."""

    def __init__(self, pipeline: Any, facts: Facts, resolution: int | None = None):
        """`resolution` is the side of the pictures in pixels. Raises ValueError where the family cannot have it."""
        self.pipeline, self.facts, self.copies = pipeline, facts, Copies()
        self.resolution = self.native_resolution if resolution is None else resolution
        if self.resolution % self.pixels_per_cell:
            near = max(1, round(self.resolution / self.pixels_per_cell)) * self.pixels_per_cell
            raise ValueError(
                f"resolution {resolution} is no multiple of {self.pixels_per_cell}; type for example --resolution {near}"
            )
        if not self.any_resolution and self.resolution != self.native_resolution:
            raise ValueError(
                f"a {type(pipeline).__name__} makes pictures of {self.native_resolution} pixels only; leave --resolution out"
            )
        schedule, scheduler = self.schedule(), type(pipeline.scheduler).__name__
        if not isinstance(schedule, self.schedules):
            raise ValueError(
                f"a {type(pipeline).__name__} with a {scheduler} is no teacher: its network is trained on a "
                f"{self.schedules.__name__} schedule; save the folder again with the scheduler it was published with"
            )
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self.denoiser = self._denoiser(getattr(pipeline, self.network_name))

    def _denoiser(self, network: nn.Module) -> Denoiser:
        prediction = prediction_of(self.pipeline.scheduler)
        return Denoiser(network, self.schedule(), prediction, self.call, self.taps(body(network)), self.tap_output)

    def schedule(self) -> Schedule:
        """The noise schedule that the pipeline's scheduler was configured for."""
        return Schedule.from_scheduler(self.pipeline.scheduler)

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """How the pipeline calls its network."""
        return call_network(network, x, timestep, cond)

    def copy(self, player: str = "critic") -> Denoiser:
        """A trainable denoiser that starts as this one, made as `copies` says for that player.

        It stays in eval mode: distillation runs without dropout, as DMD2 does.
        """
        network: nn.Module = body(self.denoiser.network)
        if player in self.copies.lora:
            seed = zlib.crc32(player.encode())  # players start from different ones
            name = unused(network, player)
            trained: nn.Module = Adapter(network, name, self.copies.rank, self.copies.targets, seed=seed)
        else:
            trained = plain(network, self.denoiser.dtype).requires_grad_(True)
        if self.copies.checkpointing:
            enable(trained)
        return self._denoiser(trained)

    def guided_by(self, adapter: GuidanceAdapter) -> Denoiser:
        """A denoiser on the teacher's own network that takes its guidance as an input, by these adapters."""
        network, plain = Guided(body(self.denoiser.network), adapter), self.denoiser
        taps = self.taps(network.base)
        return Denoiser(network, plain.schedule, plain.prediction, told(self.call), taps, self.tap_output)

    def adopt(self, adapter: GuidanceAdapter) -> None:
        """Guide by these adapters from now on, in one pass. Raises ValueError where they are those of another network."""
        adapter.check(body(self.denoiser.network))
        self.denoiser = self.guided_by(adapter.eval().requires_grad_(False))

    def to(self, device: torch.device | str) -> "Teacher":
        self.pipeline.to(device)
        self.denoiser.to(device)  # adapters are no part of the pipeline
        return self

    def rest(self) -> None:
        """Move what training itself does not call to the host's memory; it comes back by itself when it is called."""
        return None

    @property
    def remote_code(self) -> bool:
        """Whether diffusers lacks the network's class: an export then carries its code, and loads with trust_remote_code."""
        return False

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._computes_on or next(self.denoiser.network.parameters()).device

    _computes_on: torch.device | None = None

    def offload(self) -> None:
        """Keep the network's weights in the host's memory; layer by layer they are copied to the device as they are called.

        Copies of the network have to be made before. Calls raise ValueError where a gradient is to flow through the input:
        its backward pass would find the weights gone.
        """
        from diffusers.hooks import apply_group_offloading

        network, self._computes_on = body(self.denoiser.network), self.device
        network.register_forward_pre_hook(_refuse_gradient, with_kwargs=True)
        apply_group_offloading(
            network,
            onload_device=self.device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=self.device.type == "cuda",
        )

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond | None = None, guidance: float = 1.0) -> Tensor:
        """Guided x0 = x0_uncond + guidance * (x0_cond - x0_uncond), one pass over the doubled batch; shape of x_t.

        Raises ValueError where guidance is asked of a teacher without an unconditional branch.
        """
        if guidance != 1.0 and uncond is None:
            raise ValueError("this teacher has no unconditional branch; only --guidance 1 is possible")
        return guided(self.denoiser, x_t, t, cond, uncond, None if guidance == 1.0 else guidance)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        cond: Cond,
        uncond: Cond | None,
        guidance: float,
        steps: int,
        sampler: str = "ddim",
        init_rho: float | None = None,
    ) -> Tensor:
        """x0 by `steps` steps from unit noise z, one (guided) pass each.

        With `init_rho` they begin at sigma / alpha = init_rho, from sigma_t z, as if no signal were left there.

        "ddim": x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) D with D = x0 (Song et al. 2021,
        eq. 12, eta 0). "dpm++" is DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): D = x0 + (x0 - x0_before) / (2 r),
        r = h_before / h, h the step in lambda = log(alpha / sigma). "dpm++" is of second order.
        """
        schedule = self.denoiser.schedule
        grid = schedule.grid(steps, 1.0 if init_rho is None else schedule.fraction(schedule.at_rho(init_rho)))
        kind = torch.long if isinstance(grid[0], int) else z.dtype
        lambdas = [(a.log() - b.log()).item() for a, b in (schedule.coefficients(torch.tensor([t])) for t in grid)]
        start = schedule.init_sigma if init_rho is None else float(schedule.coefficients(torch.tensor([grid[0]]))[1])
        x_0 = before = x_t = start * z
        for i, here in enumerate(grid):
            t = torch.full((len(z),), here, device=z.device, dtype=kind)
            before, x_0 = x_0, self(x_t, t, cond, uncond, guidance)
            if i + 1 == len(grid):
                break
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t, z), schedule(torch.full_like(t, grid[i + 1]), z)
            target = x_0
            if sampler == "dpm++" and i > 0:
                target = x_0 + (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1]) / 2 * (x_0 - before)
            x_t = alpha_s * target + sigma_s * (x_t - alpha_t * target) / sigma_t
        return x_0

    @property
    @abstractmethod
    def native_resolution(self) -> int:
        """Side of its pictures in pixels, by its own configuration."""

    @property
    @abstractmethod
    def pixels_per_cell(self) -> int:
        """Pixels a side for one cell of x0, patches included: resolutions are multiples of it."""

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
        """Number of conditions it can be given: its classes, or the prompts in use."""

    @abstractmethod
    def taps(self, network: nn.Module) -> list[str]:
        """Names of the submodules whose outputs a discriminator reads."""

    @abstractmethod
    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        """(cond, uncond) for a batch of conditions, shape (B,): class labels, or rows of the table of prompts."""

    def latent_units(self) -> dict[str, float | None]:
        """latent_scale and latent_shift of `Facts`; None in pixel space."""
        return {"latent_scale": None, "latent_shift": None}

    def named(self, conditions: list[int]) -> list[Any]:
        """What the stock pipeline is asked for to get these conditions."""
        return conditions

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        """What the stock pipeline is called with for plain conditional pictures of these conditions."""
        return {"class_labels": conditions}

    def example_arguments(self, count: int) -> dict[str, Any]:
        """`arguments` of up to `count` conditions that show what it can do."""
        return self.arguments(list(range(min(count, self.classes))))

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype the stock pipeline draws its noise where its parts are of `dtype`."""
        return dtype

    def later_noise(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A chain's later noise, (B, *shape of x0), as the stock pipeline draws it from torch's own generator."""
        return torch.randn(shape, dtype=dtype)

    def spacing(self, steps: int) -> dict[str, Any]:
        """What the stock pipeline gives its scheduler to set `steps` times by, beside their number; by default nothing."""
        return {}

    def complete(self, pipeline: Any) -> None:
        """Note in a new pipeline of this family what its class would lose when it is saved; by default nothing."""
        return None

    @abstractmethod
    def to_x0(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to x0 units: VAE latents, or the pixels themselves."""

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """x0 to images (B, C, H, W), [-1, 1] but for overshoots; differentiable."""

    def to_images(self, x_0: Tensor) -> Tensor:
        """x0 to images (B, C, H, W) in [0, 1]."""
        return (self.decode(x_0) / 2 + 0.5).clamp(0, 1)


def _refuse_gradient(network: nn.Module, args: Any, kwargs: Any) -> None:
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        raise ValueError("this method needs gradients through its teacher, which --offload does not have: leave it out")
