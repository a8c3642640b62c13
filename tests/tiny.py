"""Tiny diffusers pipelines with random weights: made in well under a second, the same on every call."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from torch import nn


def randomise(module: nn.Module, seed: int, scale: float = 0.05) -> None:
    """Add N(0, scale^2) to every parameter, the same for the same seed, so that no layer keeps its initial zeros."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=source)
            parameter.add_(scale * noise.to(parameter))


def dit_pipeline(prediction_type: str = "epsilon", learned_variance: bool = False, size: int = 8, classes: int = 10) -> Any:
    """A DiTPipeline: latents (4, size, size), pictures (1, 2 size, 2 size), 1000 linear betas, null class 1000.

    `learned_variance` doubles the network's output channels. `pipeline.labels` has `classes` names, or none for 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learned_variance else 4,
            num_layers=2,
            attention_bias=True,
            sample_size=size,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=2 * size,
            scaling_factor=0.5,
        )
    randomise(transformer, seed=1)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type=prediction_type,
    )
    names = {i: f"class {i}" for i in range(classes)} or None
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), scheduler, id2label=names)
    # DiTPipeline forgets id2label when it is saved again; from_pretrained leaves it in the config
    pipeline.register_to_config(id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edm_pipeline(channels: int = 1, classes: int | None = 10, size: int = 8) -> Any:
    """A ConsistencyModelPipeline: UNet on pixels (channels, size, size), EDM sigmas 0.002 .. 80, sigma_data 0.5.

    `classes=None` is an unconditional one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
            num_class_embeds=classes,
        )
    randomise(unet, seed=1)
    pipeline = ConsistencyModelPipeline(unet.eval(), CMStochasticIterativeScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
