"""Flux."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..schedule import RectifiedFlow, Schedule
from .text import TextTeacher


class FluxTeacher(TextTeacher):
    """diffusers' FluxPipeline: rectified flow with a shift that grows with the picture, latents packed 2x2 into tokens.

    FLUX.1-dev takes its guidance as an input, `Facts.embedded_guidance`; true guidance on top of it is possible.
    """

    schedules = RectifiedFlow
    network_name = "transformer"
    tap_output = 1
    encoders = ("text_encoder", "text_encoder_2")
    seeded_chain = False

    @property
    def native_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.latent_factor

    @property
    def pixels_per_cell(self) -> int:
        return 2 * self.latent_factor

    @property
    def shape(self) -> tuple[int, ...]:
        side = self.resolution // self.latent_factor
        return (self.network.config.in_channels // 4, side, side)

    @property
    def embedded_guidance(self) -> float:
        return 3.5 if self.facts.embedded_guidance is None else self.facts.embedded_guidance

    def schedule(self) -> Schedule:
        config = self.pipeline.scheduler.config
        tokens = (self.resolution // self.pixels_per_cell) ** 2
        return RectifiedFlow(shift=shift_of(config, tokens), num_train_timesteps=config.num_train_timesteps)

    def taps(self, network: Any) -> list[str]:
        return [f"transformer_blocks.{len(network.transformer_blocks) - 1}"]

    def _embed(self, prompts: list[str]) -> tuple[Cond, Cond]:
        def rows(texts: list[str]) -> Cond:
            states, pooled, _ = self.pipeline.encode_prompt(texts, None, device=self.device)
            return {"encoder_hidden_states": states, "pooled_projections": pooled}

        return rows(prompts), rows([""])

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        cond, uncond = super().encode(conditions)
        assert uncond is not None
        if not self.network.config.guidance_embeds:
            return cond, uncond
        guidance = torch.full((len(conditions),), self.embedded_guidance, device=self.device)
        return cond | {"guidance": guidance}, uncond | {"guidance": guidance}

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        b, c, h, w = x.shape
        packed = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        img_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(x)
        txt_ids = img_ids.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
        # the network multiplies the time by 1000 itself
        out = network(packed, timestep=timestep / 1000, img_ids=img_ids, txt_ids=txt_ids, return_dict=False, **cond)[0]
        return unpacked(out, x.shape)

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        return super().arguments(conditions) | {"guidance_scale": self.embedded_guidance}

    def later_noise(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        b, c, h, w = shape  # the pipeline's scheduler sees tokens
        return unpacked(torch.randn(b, h * w // 4, 4 * c, dtype=dtype), shape)

    def spacing(self, steps: int) -> dict[str, Any]:
        return {"sigmas": [1 - k / steps for k in range(steps)]}


def unpacked(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Latents of that shape, (B, C, H, W), from tokens of 2x2 of them, shape (B, H W / 4, 4 C)."""
    b, c, h, w = shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def shift_of(config: Any, tokens: int) -> float:
    """The time shift of a flow scheduler; where it is dynamic, exp(mu) with mu linear in the number of image tokens.

    Raises ValueError for another kind of dynamic shift.
    """
    if not config.use_dynamic_shifting:
        return config.shift
    if config.time_shift_type != "exponential":
        raise ValueError(f"time_shift_type {config.time_shift_type!r} is not known; allowed is 'exponential'")
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))
