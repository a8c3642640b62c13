"""Teachers in pixel space: diffusers' UNet2DModel, and the networks of EDM."""

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..denoiser import Cond
from ..schedule import EDM, VP, Schedule
from .base import Teacher


class PixelTeacher(Teacher):
    """x0 is the picture itself in [-1, 1], shape (C, side, side)."""

    network_name = "unet"
    seeded_chain = True
    pixels_per_cell = 1
    unconditional = False

    @property
    def native_resolution(self) -> int:
        return self.pipeline.unet.config.sample_size

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.pipeline.unet.config.in_channels, self.resolution, self.resolution)

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.shape[0], self.resolution

    def to_x0(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0


class EDMTeacher(PixelTeacher):
    """EDM preconditioning in diffusers' ConsistencyModelPipeline; optional class labels.

    The network is a UNet2DModel, or one of `onestep.networks`: an EDMUNet.
    """

    schedules = EDM
    export_scale = "sigma"

    @property
    def remote_code(self) -> bool:
        # not "is an EDMUNet": in an export it is the class of that name in the folder's own file
        return not isinstance(self.pipeline.unet, UNet2DModel)

    def taps(self, network: nn.Module) -> list[str]:
        if not self.remote_code:
            return ["mid_block"]
        config = self.pipeline.unet.config
        side = config.sample_size >> (len(config.channel_mult) - 1)
        return [f"dec.{side}x{side}_in1"]

    def schedule(self) -> Schedule:
        """With the network's c_noise as time, of which a scheduler's timestep is a `time_scale`-th."""
        schedule = super().schedule()
        if self.remote_code and isinstance(schedule, EDM):
            schedule.noise_scale *= self.pipeline.unet.config.time_scale
        return schedule

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        if self.remote_code:
            timestep = timestep / self.pipeline.unet.config.time_scale
        return super().call(network, x, timestep, cond)

    @property
    def classes(self) -> int:
        return self.pipeline.unet.config.num_class_embeds or 1

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        if self.pipeline.unet.config.num_class_embeds is None:
            return {}, None
        return {"class_labels": conditions}, None

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        cond, _ = self.encode(torch.tensor(conditions))
        return ({"class_labels": conditions} if cond else {}) | {"batch_size": len(conditions)}


class DDPMTeacher(PixelTeacher):
    """diffusers' DDPMPipeline (Ho et al. 2020): unconditional, VP."""

    schedules = VP
    export_scale = "unit"
    classes = 1

    def taps(self, network: nn.Module) -> list[str]:
        return ["mid_block"]

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        return {}, None

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        return {"batch_size": len(conditions)}
