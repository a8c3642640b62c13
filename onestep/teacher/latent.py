"""Teachers in the latent space of an autoencoder."""

from typing import Any

import torch
from torch import Tensor

from ..precision import full_precision
from .base import Teacher


class LatentTeacher(Teacher):
    """x0 = (z - shift) * scale for latents z of the pipeline's `vae`, shape (C, side / f, side / f)."""

    export_scale = "unit"

    @property
    def network(self) -> Any:
        return getattr(self.pipeline, self.network_name)

    @property
    def latent_factor(self) -> int:
        """Pixels a side for one latent."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        return self.network.config.sample_size * self.latent_factor

    @property
    def pixels_per_cell(self) -> int:
        return self.latent_factor * self.network.config.get("patch_size", 1)

    @property
    def shape(self) -> tuple[int, ...]:
        side = self.resolution // self.latent_factor
        return (self.network.config.in_channels, side, side)

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.pipeline.vae.config.get("out_channels", 3), self.resolution

    @property
    def latent_scale(self) -> float:
        return self.pipeline.vae.config.scaling_factor

    @property
    def latent_shift(self) -> float:
        return self.pipeline.vae.config.get("shift_factor") or 0.0

    def latent_units(self) -> dict[str, float | None]:
        return {"latent_scale": self.latent_scale, "latent_shift": self.latent_shift}

    def rest(self) -> None:
        self.pipeline.vae.to("cpu")

    def _vae_on(self, device: torch.device) -> Any:
        vae = self.pipeline.vae
        return vae if vae.device == device else vae.to(device)

    @torch.no_grad()
    def to_x0(self, images: Tensor) -> Tensor:
        vae = self._vae_on(images.device)
        with full_precision(vae):
            return (self._latents(vae, images).float() - self.latent_shift) * self.latent_scale

    def _latents(self, vae: Any, images: Tensor) -> Tensor:
        return vae.encode(images).latent_dist.mode()

    def decode(self, x_0: Tensor) -> Tensor:
        vae = self._vae_on(x_0.device)
        with full_precision(vae):
            return vae.decode((x_0 / self.latent_scale + self.latent_shift).float()).sample
