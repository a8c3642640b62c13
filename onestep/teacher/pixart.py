"""PixArt-alpha, PixArt-Sigma and Sana: transformers on one language model's tokens."""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..schedule import VP, RectifiedFlow, Schedule
from .text import TextTeacher


class PixArtTeacher(TextTeacher):
    """diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline: VP, epsilon with a learned variance, T5 tokens with a mask.

    The alpha checkpoints of 1024 pixels also take resolution and aspect ratio.
    """

    schedules: ClassVar[type[Schedule]] = VP
    network_name = "transformer"

    @property
    def sized(self) -> bool:
        """Whether the pipeline feeds the picture's size, by the pipeline's own rule."""
        return type(self.pipeline).__name__ == "PixArtAlphaPipeline" and self.network.config.sample_size == 128

    def taps(self, network: Any) -> list[str]:
        return [f"transformer_blocks.{(len(network.transformer_blocks) - 1) // 2}"]

    def _embed(self, prompts: list[str]) -> tuple[Cond, Cond]:
        cond, mask, uncond, null_mask = self.pipeline.encode_prompt(prompts, device=self.device, **self._encoding())
        return (
            {"encoder_hidden_states": cond, "encoder_attention_mask": mask},
            {"encoder_hidden_states": uncond, "encoder_attention_mask": null_mask},
        )

    def _encoding(self) -> dict[str, Any]:
        """The pipeline's own defaults for `encode_prompt`."""
        given = inspect.signature(type(self.pipeline).__call__).parameters
        return {"max_sequence_length": given["max_sequence_length"].default}

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        cond, uncond = super().encode(conditions)
        assert uncond is not None
        if not self.sized:
            return cond, uncond
        like = cond["encoder_hidden_states"]
        size = {
            "resolution": like.new_full((len(conditions), 2), self.resolution),
            "aspect_ratio": like.new_ones(len(conditions), 1),
        }
        return cond | size, uncond | size

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return network(
            x,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=timestep,
            added_cond_kwargs={key: cond.get(key) for key in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        # the size that was asked for, and the text as it was embedded
        return super().arguments(conditions) | {"use_resolution_binning": False, "clean_caption": False}


class SanaTeacher(PixArtTeacher):
    """diffusers' SanaPipeline: rectified flow, latents of 32 pixels a side (AutoencoderDC), Gemma tokens with a mask."""

    schedules = RectifiedFlow
    pixels_per_cell = 32  # the pipeline's own rule

    @property
    def latent_factor(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.encoder_block_out_channels) - 1)

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.pipeline.vae.config.in_channels, self.resolution

    def _latents(self, vae: Any, images: Tensor) -> Tensor:
        return vae.encode(images).latent

    def _encoding(self) -> dict[str, Any]:
        given = inspect.signature(type(self.pipeline).__call__).parameters
        return {key: given[key].default for key in ("max_sequence_length", "complex_human_instruction")}

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        # the pipeline's own default is 1024 pixels, whatever its network
        return super().arguments(conditions) | {"height": self.resolution, "width": self.resolution}

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        scaled = timestep * torch.as_tensor(self.network.config.timestep_scale, dtype=timestep.dtype)
        return network(x, timestep=scaled, return_dict=False, **cond)[0]
