"""A student of the teacher's class with fewer blocks or fewer channels.

It starts with every weight of the teacher that it has in the same shape, its blocks being evenly spaced ones of the
teacher's, and with the class's own random weights elsewhere. What follows is its training as a denoiser
(`onestep.objectives.score_matching`), before any method makes a generator of it.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .checkpointing import enable
from .denoiser import Denoiser
from .teacher import Teacher

Changes = dict[str, Any]
"""Entries of a network's config that a smaller one has otherwise."""
LEAVE = "leave --student-blocks and --student-width out"
BLOCKS = re.compile(r"^((?:single_)?transformer_blocks)\.(\d+)\.")


def _heads(config: Mapping[str, Any], width: float) -> int:
    return max(1, round(config["num_attention_heads"] * width))


def _transformer(config: Mapping[str, Any], blocks: int, width: float, *inner: str) -> Changes:
    """Fewer blocks and heads; the entries `inner` are the sum of the heads' dimensions."""
    heads = _heads(config, width)
    return {"num_layers": blocks, "num_attention_heads": heads, **dict.fromkeys(inner, heads * config["attention_head_dim"])}


def _pixart(config: Mapping[str, Any], blocks: int, width: float) -> Changes:
    return _transformer(config, blocks, width, "cross_attention_dim")


def _sana(config: Mapping[str, Any], blocks: int, width: float) -> Changes:
    changes = _transformer(config, blocks, width, "cross_attention_dim")
    # attention to the text has heads of its own size, which together have the same dimensions
    across = changes["cross_attention_dim"] // config["cross_attention_head_dim"]
    if across * config["cross_attention_head_dim"] != changes["cross_attention_dim"]:
        raise ValueError(
            f"a width of {changes['cross_attention_dim']} channels is no multiple of the text attention's "
            f"{config['cross_attention_head_dim']}; type another --student-width"
        )
    return changes | {"num_cross_attention_heads": across}


def _sd3(config: Mapping[str, Any], blocks: int, width: float) -> Changes:
    dual = tuple(index for index in config["dual_attention_layers"] or () if index < blocks)
    return _transformer(config, blocks, width, "caption_projection_dim") | {"dual_attention_layers": dual}


def _flux(config: Mapping[str, Any], blocks: int, width: float) -> Changes:
    single = max(1, round(config["num_single_layers"] * blocks / config["num_layers"]))
    return _transformer(config, blocks, width) | {"num_single_layers": single}


def _unet(config: Mapping[str, Any], blocks: int, width: float) -> Changes:
    """Fewer layers at each resolution, and channels rounded to what its norms and heads divide."""
    heads = config["attention_head_dim"] or 1
    unit = math.lcm(config["norm_num_groups"], *(heads if isinstance(heads, (list, tuple)) else [heads]))
    channels = tuple(max(unit, round(each * width / unit) * unit) for each in config["block_out_channels"])
    return {"layers_per_block": blocks} | ({} if width == 1 else {"block_out_channels": channels})


SMALLER: dict[str, tuple[str, Callable[[Mapping[str, Any], int, float], Changes]]] = {
    "DiTTransformer2DModel": ("num_layers", _transformer),
    "FluxTransformer2DModel": ("num_layers", _flux),
    "PixArtTransformer2DModel": ("num_layers", _pixart),
    "SD3Transformer2DModel": ("num_layers", _sd3),
    "SanaTransformer2DModel": ("num_layers", _sana),
    "UNet2DConditionModel": ("layers_per_block", _unet),
    "UNet2DModel": ("layers_per_block", _unet),
}
"""Classes of networks that can be made smaller: the entry that counts their blocks, and what is changed."""


def smaller(teacher: Teacher, blocks: int | None, width: float) -> Denoiser:
    """A trainable denoiser like the teacher's, with `blocks` blocks (None: as many) and `width` times its channels.

    Of a UNet blocks are layers at each resolution. Its first weights are the same on every call. Raises ValueError for a
    class of networks that is not in the table, for more blocks than the teacher has, and for a student that is an adapter.
    """
    network: Any = teacher.denoiser.network
    name = type(network).__name__
    if "student" in teacher.copies.lora:
        raise ValueError(
            "an adapter has the teacher's own size: type --student full, or leave --student-blocks and -width out"
        )
    if name not in SMALLER:
        raise ValueError(f"a {name} cannot be made smaller: {LEAVE}; possible is it for {', '.join(SMALLER)}")
    counted, change = SMALLER[name]
    most = network.config[counted]
    if not isinstance(most, int):
        raise ValueError(f"this {name} has {counted} {most}, which are not one number: {LEAVE}")
    if blocks is not None and blocks > most:
        raise ValueError(
            f"student_blocks {blocks} are more than the teacher's {most}; type --student-blocks {most} or fewer"
        )
    config = {**network.config, **change(network.config, blocks or most, width)}
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would also reseed the accelerators
        torch.default_generator.manual_seed(0)
        small: nn.Module = type(network).from_config(config)
    nn.Module.to(small, teacher.device, teacher.denoiser.dtype)  # its own would warn of a cast
    small.eval().requires_grad_(True)
    inherit(small, network)
    if teacher.copies.checkpointing:
        enable(small)
    own = teacher.denoiser
    return Denoiser(small, own.schedule, own.prediction, teacher.call, teacher.taps(small), teacher.tap_output)


@torch.no_grad()
def inherit(small: nn.Module, network: nn.Module) -> None:
    """Copy every tensor that has the same shape in both; the i-th of n blocks is the one at i (N - 1) / (n - 1) of N."""
    source, target = network.state_dict(), small.state_dict()
    counts = [_counts(keys) for keys in (source, target)]

    def origin(found: re.Match[str]) -> str:
        stack, index = found[1], int(found[2])
        many, few = (count[stack] for count in counts)
        return f"{stack}.{round(index * (many - 1) / max(1, few - 1))}."

    for name, tensor in target.items():
        given = source.get(BLOCKS.sub(origin, name, count=1))
        if given is not None and given.shape == tensor.shape:
            tensor.copy_(given)


def _counts(names: Mapping[str, Any]) -> dict[str, int]:
    """How many blocks each stack of blocks has."""
    found: dict[str, int] = {}
    for match in filter(None, map(BLOCKS.match, names)):
        found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found
