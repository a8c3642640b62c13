"""Class-conditional latent diffusion transformers."""

from typing import Any

import torch
from torch import Tensor

from ..denoiser import Cond
from ..schedule import VP
from .latent import LatentTeacher


class DiTTeacher(LatentTeacher):
    """diffusers' DiTPipeline (Peebles & Xie 2023): class labels, latents, null class 1000."""

    schedules = VP
    network_name = "transformer"
    seeded_chain = False

    @property
    def classes(self) -> int:
        return len(self.pipeline.labels) or self.pipeline.transformer.config.num_embeds_ada_norm

    def taps(self, network: Any) -> list[str]:
        return [f"transformer_blocks.{(len(network.transformer_blocks) - 1) // 2}"]

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        return {"class_labels": conditions}, {"class_labels": torch.full_like(conditions, 1000)}

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        return {"class_labels": conditions, "guidance_scale": 1}

    def complete(self, pipeline: Any) -> None:
        # the class keeps its names as {name: id}, and loses them when it is saved unless its config has them
        names: dict[int, list[str]] = {}
        for name, index in self.pipeline.labels.items():
            names.setdefault(index, []).append(name)
        if names:
            pipeline.register_to_config(id2label={index: ", ".join(each) for index, each in sorted(names.items())})
