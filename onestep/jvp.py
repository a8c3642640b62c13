"""Derivatives of a network along a direction, d/dh f(x + h dx, t + h dt) at h = 0, by forward-mode differentiation.

One pass of the bare network without a graph. A wrapper for several processes sees nothing of it: there the pass with the
gradient is a pass like any other, so that gradients are shared as always.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .compiling import eagerly
from .denoiser import Cond, Denoiser, body, unwrap
from .precision import HALVES

STEP = 5e-4
"""h of the finite difference: in float32 its two errors, h^2 / 6 and 1e-7 / h of a value, are about equal here."""


def forward(
    function: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor], step: float | None = None
) -> Tensor:
    """Exact, in one pass; `step` is for the difference alone.

    Raises ValueError where an operation of the network has no forward derivative.
    """
    try:
        # fused attention has no forward derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            value = function(*map(forward_ad.make_dual, at, along))
            slope = forward_ad.unpack_dual(value).tangent
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in ("forward AD", "forward mode AD", "jvp")):
            raise
        raise ValueError(
            f"this network has no forward derivative: {' '.join(str(error).split())[:200]}. Type --jvp difference, which "
            "takes two passes in its place"
        ) from error
    return torch.zeros_like(value) if slope is None else slope


def difference(
    function: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor], step: float | None = None
) -> Tensor:
    """(f(x + h dx) - f(x - h dx)) / 2h in two passes, which also run without autocast: half precision drowns it.

    `step` is h, `STEP` unless it is given. A larger one is the mean of the derivative over [-h, h]: what a network has of
    finer structure than that in its time embedding is averaged out.
    """
    size = STEP if step is None else step
    with torch.no_grad(), torch.autocast(at[0].device.type, enabled=False):
        ahead, behind = (function(*(x + h * dx for x, dx in zip(at, along))) for h in (size, -size))
    return (ahead - behind) / (2 * size)


JVP: dict[str, Callable[..., Tensor]] = {
    "forward": forward,
    "difference": difference,
}
"""Ways to have the derivative of function(*at) along `along`, without a graph, by the names that `--jvp` takes.

Called with (function, at, along, step).
"""


def bare(denoiser: Denoiser) -> Denoiser:
    """The denoiser on its network without a distributed wrapper, to be differentiated forwards."""

    def call(network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        weight = next(body(network).parameters(), None)
        half = weight is not None and weight.dtype in HALVES
        with (
            eagerly(network),
            _Upcast() if half else nullcontext(),
        ):  # every operation passes through the mode, which takes time
            return denoiser.call(network, x, timestep, cond)

    return Denoiser(unwrap(denoiser.network), denoiser.schedule, denoiser.prediction, call)


class _Upcast(TorchFunctionMode):
    """Weights in half precision are converted by operations that have a forward derivative.

    Those of `onestep.precision`, which keep the memory of a backward pass small, have none. Under autocast the dtypes are
    its own affair.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.conv2d) and not torch.is_autocast_enabled(args[0].device.type):
            args = tuple(_full(each) for each in args)
            kwargs = {name: _full(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _full(each: Any) -> Any:
    return each.float() if isinstance(each, Tensor) and each.dtype in HALVES else each
