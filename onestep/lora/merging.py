"""Plain networks made of a base with adapters."""

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .switch import lora_layers


@torch.no_grad()
def plain(
    base: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None, adapter: str | None = None
) -> nn.Module:
    """A new network of the base's own class, configuration and keys: W, or W + (alpha / rank) B A of one adapter.

    The sum is made in float32 at least and rounded once to `dtype`, one layer after the other. All floating-point
    tensors are in `dtype`, on `device` (None: the base's). The base and its adapters are left as they are.
    """
    layers: list[Any] = lora_layers(base)  # each kind of them has the method that is called below
    adapters = {id(p) for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}
    # the copy is made by deepcopy, told beforehand what becomes of every tensor and of every layer with adapters
    memo: dict[int, Any] = {}
    for layer in layers:
        weight: Any = layer.get_base_layer().weight
        if adapter is not None and adapter in layer.lora_A:
            memo[id(weight)] = _stored(weight + layer.get_delta_weight(adapter), weight, dtype, device)
    for tensor in chain(base.parameters(), base.buffers()):
        if id(tensor) not in memo and id(tensor) not in adapters:
            memo[id(tensor)] = _stored(tensor, tensor, dtype, device)
    for layer in layers:
        memo[id(layer)] = copy.deepcopy(layer.get_base_layer(), memo)
    return copy.deepcopy(base, memo)


def _stored(value: Tensor, like: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """A copy of `value`, a parameter where `like` is one."""
    tensor = value.detach().to(device or value.device, dtype if value.is_floating_point() else value.dtype, copy=True)
    return nn.Parameter(tensor, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else tensor
