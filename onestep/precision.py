"""Weights stored in half precision and arithmetic in full, for frozen networks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)


def full_precision(network: nn.Module) -> AbstractContextManager[Any]:
    """Within it, calls of a network that is stored in half precision compute in float32, or what higher they are given.

    Every weight is converted where it is used and again in the backward pass, so that never more than one layer's is
    there twice. Nothing changes under autocast, nor for a network in full precision. Weights in half precision have to
    be frozen.
    """
    weight = next(network.parameters(), None)
    if weight is None or weight.dtype not in HALVES or torch.is_autocast_enabled(weight.device.type):
        return nullcontext()
    return _Upcast()


class _Linear(torch.autograd.Function):
    """x W^T + b for frozen W and b; W is kept as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None, None


class _Conv2d(torch.autograd.Function):
    """A convolution with frozen weights, which are kept as they are stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        back = conv2d_input(ctx.shape, weight.to(grads[0].dtype), grads[0], *ctx.settings)
        return back, None, None, *(None for _ in ctx.settings)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(_full(x), weight, bias) if _stored(weight) else F.linear(x, weight, bias)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    settings = (stride, padding, dilation, groups)
    return _Conv2d.apply(_full(x), weight, bias, *settings) if _stored(weight) else F.conv2d(x, weight, bias, *settings)


def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    x = _full(x)
    return F.group_norm(x, groups, _like(x, weight), _like(x, bias), eps)


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    x = _full(x)
    return F.layer_norm(x, shape, _like(x, weight), _like(x, bias), eps)


def _embedding(index: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _full(F.embedding(index, weight, *args, **kwargs))


def _stored(weight: Tensor) -> bool:
    return weight.dtype in HALVES and not weight.requires_grad


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x


def _like(x: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


LAYERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.conv2d: _conv2d,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
}


class _Upcast(TorchFunctionMode):
    """Replaces the functions that meet weights; it is off again while they run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return LAYERS.get(func, func)(*args, **(kwargs or {}))
