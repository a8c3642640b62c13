"""Stable Diffusion 1.5, 2.1, XL and 3."""

from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..schedule import VP, RectifiedFlow
from .text import TextTeacher

GUIDANCE_KEY = "timestep_cond"
"""Name, among a batch's conditions, of the guidance of a UNet that takes it as an input (Luo et al. 2023)."""


def guidance_features(guidance: Tensor, size: int) -> Tensor:
    """[sin(w v), cos(w v)] of v = 1000 (guidance - 1) with w_i = 10000^(-i / (n - 1)), i < n = size / 2. (B,) -> (B, size).

    What diffusers' pipelines feed (`get_guidance_scale_embedding`), to the last bit: v is some thousands, and float32's
    rounding of it would be seen in the sines. A float64 guidance is taken 1 from before it is rounded, as theirs is.
    """
    step = torch.full((), 10000.0, device=guidance.device).log() / (size // 2 - 1)
    frequencies = torch.exp(torch.arange(size // 2, dtype=torch.float32, device=guidance.device) * -step)
    angles = ((guidance - 1).float() * 1000)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SDTeacher(TextTeacher):
    """diffusers' StableDiffusionPipeline: 1.5 (epsilon) and 2.1 (v). The safety checker is left out.

    A network with diffusers' input of guidance (`time_cond_proj_dim`) is given that of `embedded_guidance`.
    """

    schedules = VP
    network_name = "unet"
    load_arguments = {"safety_checker": None, "requires_safety_checker": False}

    def taps(self, network: nn.Module) -> list[str]:
        return ["mid_block"]

    @property
    def pixels_per_cell(self) -> int:
        return self.latent_factor * 2 ** (len(self.network.config.block_out_channels) - 1)

    def _embed(self, prompts: list[str]) -> tuple[Cond, Cond]:
        cond, uncond = self.pipeline.encode_prompt(prompts, self.device, 1, True)
        return {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}

    @property
    def embedded_guidance(self) -> float:
        return self.facts.guidance if self.facts.embedded_guidance is None else self.facts.embedded_guidance

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        cond, uncond = super().encode(conditions)
        size = self.network.config.time_cond_proj_dim
        if size is None:
            return cond, uncond
        assert uncond is not None
        one = guidance_features(torch.tensor([self.embedded_guidance], dtype=torch.float64), size)
        told = {GUIDANCE_KEY: one.to(self.device, self.denoiser.dtype).expand(len(conditions), size)}
        return cond | told, uncond | told

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        takes = self.network.config.time_cond_proj_dim is not None
        return super().arguments(conditions) | ({"guidance_scale": self.embedded_guidance} if takes else {})


class SDXLTeacher(SDTeacher):
    """diffusers' StableDiffusionXLPipeline: two text encoders, pooled text, and sizes as conditions.

    The size condition is (height, width, 0, 0, height, width): original size, crop and target size of a whole picture.
    """

    load_arguments = {}
    encoders = ("text_encoder", "text_encoder_2")

    def _embed(self, prompts: list[str]) -> tuple[Cond, Cond]:
        cond, uncond, pooled, null = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return (
            {"encoder_hidden_states": cond, "text_embeds": pooled},
            {"encoder_hidden_states": uncond, "text_embeds": null},
        )

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        cond, uncond = super().encode(conditions)
        assert uncond is not None
        side = self.resolution
        time_ids = cond["text_embeds"].new_tensor([side, side, 0, 0, side, side]).expand(len(conditions), 6)
        return cond | {"time_ids": time_ids}, uncond | {"time_ids": time_ids}

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
        given = {key: cond[key] for key in ("encoder_hidden_states", GUIDANCE_KEY) if key in cond}
        return network(x, timestep, added_cond_kwargs=added, return_dict=False, **given)[0]


class SD3Teacher(TextTeacher):
    """diffusers' StableDiffusion3Pipeline: rectified flow, three text encoders, pooled text."""

    schedules = RectifiedFlow
    network_name = "transformer"
    tap_output = 1
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    seeded_chain = False

    def taps(self, network: Any) -> list[str]:
        return [f"transformer_blocks.{(len(network.transformer_blocks) - 1) // 2}"]

    def _embed(self, prompts: list[str]) -> tuple[Cond, Cond]:
        cond, uncond, pooled, null = self.pipeline.encode_prompt(prompts, None, None, device=self.device)
        return (
            {"encoder_hidden_states": cond, "pooled_projections": pooled},
            {"encoder_hidden_states": uncond, "pooled_projections": null},
        )

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return network(hidden_states=x, timestep=timestep, return_dict=False, **cond)[0]
