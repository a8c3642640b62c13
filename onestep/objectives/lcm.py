"""LCM: Latent Consistency Models (Luo et al. 2023, arXiv 2310.04378), and LCM-LoRA (Luo et al. 2023, arXiv 2311.05556)."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..denoiser import Call, Cond
from ..generator import Generator
from ..methods.lcm import LCMConfig
from ..rng import Rng
from ..teacher.stable_diffusion import GUIDANCE_KEY, guidance_features
from .cd import CD
from .score import per_sample

FEATURES = 256
"""Sines and cosines of the guidance that the student is given."""


class LCM(CD):
    """Consistency distillation of a guided teacher, w ~ U[guidance_min, guidance_max] one a sample (section 4.2).

    A student that is not told w, such as an adapter, learns the mean over w.
    """

    Config = LCMConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.config.guidance_max and not self.teacher.unconditional:
            raise ValueError("this teacher has no unconditional branch; leave --guidance-min and --guidance-max out")

    @classmethod
    def prepare(cls, config: LCMConfig, generator: Generator) -> None:
        if config.embed_guidance:
            add_guidance(generator.denoiser.network)
            generator.denoiser.call = always_told(generator.denoiser.call, cls.ends_at(config, 0.0))

    @classmethod
    def ends_at(cls, config: LCMConfig, guidance: float) -> float:
        return (config.guidance_min + config.guidance_max) / 2 if config.guidance_max else guidance

    def guide(self, like: Tensor, rng: Rng) -> Tensor | float:
        c = self.config
        if not c.guidance_max:
            return self.guidance
        return per_sample(rng.uniform(c.guidance_min, c.guidance_max).to(like.dtype), like)

    def told(self, guidance: Tensor | float) -> Cond:
        if not self.config.embed_guidance:
            return {}
        assert isinstance(guidance, Tensor)
        return {GUIDANCE_KEY: guidance_features(guidance.flatten(), FEATURES)}


def add_guidance(network: nn.Module) -> None:
    """Give a UNet of Stable Diffusion diffusers' own input of guidance, in place; its weights start at zero.

    h = W (e + P f) + b for the features e of the time and f of the guidance. Raises ValueError for other networks.
    """
    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(
            f"a {type(network).__name__} has no input for guidance; only a UNet2DConditionModel trained in full has one "
            "(--student full): leave --embed-guidance out"
        )
    if network.config["time_cond_proj_dim"] is not None:
        raise ValueError("this UNet already takes guidance as an input; leave --embed-guidance out")
    weight = network.time_embedding.linear_1.weight
    layer = nn.Linear(FEATURES, weight.shape[1], bias=False).to(weight.device, weight.dtype)
    nn.init.zeros_(layer.weight)
    network.time_embedding.cond_proj = layer
    network.register_to_config(time_cond_proj_dim=FEATURES)


def always_told(call: Call, guidance: float) -> Call:
    """`call` with this guidance wherever the conditions name none, such as in a sample of the student for a person."""

    def told(network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        if GUIDANCE_KEY not in cond:
            one = guidance_features(torch.tensor([guidance], dtype=torch.float64), FEATURES)
            cond = cond | {GUIDANCE_KEY: one.to(x).expand(len(x), FEATURES)}
        return call(network, x, timestep, cond)

    return told
