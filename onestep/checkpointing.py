"""Activations recomputed in the backward pass instead of kept, for networks that share their weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

from diffusers import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from .denoiser import Stop, body
from .lora import active, active_name
from .precision import full_precision


def enable(network: nn.Module) -> None:
    """Keep only the inputs of the network's blocks for the backward pass; calls without gradients run as before.

    A base with adapters is enabled for all of them: each block is recomputed with the adapter that it ran with.
    Raises ValueError where the network's class cannot do it.
    """
    base: Any = body(network)
    if not isinstance(base, ModelMixin) or not base._supports_gradient_checkpointing:
        raise ValueError(f"a {type(base).__name__} has no gradient checkpointing; go without")
    # a partial: a deepcopy of the network copies it too, and then means the copy
    base.enable_gradient_checkpointing(partial(_checkpointed, base))


def _checkpointed(base: nn.Module, block: Callable[..., Any], *args: Any) -> Any:
    """block(*args), its activations recomputed in the backward pass with the adapter that is active now."""
    name = active_name(base)
    stopped = False

    def run(*inputs: Any) -> Any:
        nonlocal stopped
        try:
            return block(*inputs)
        except Stop:  # passing through older versions of checkpoint, it would leave their bookkeeping half done
            stopped = True
            return None

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Again(base, name)

    result = checkpoint(run, *args, use_reentrant=False, context_fn=contexts)
    if stopped:
        raise Stop  # a new one: the first, kept here, would keep its frames and their tensors alive
    return result


class _Again(AbstractContextManager[None]):
    """What a forward pass ran in. It is entered once more each time that its graph is walked back."""

    def __init__(self, base: nn.Module, name: str | None):
        self.base, self.name, self.stack = base, name, ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(active(self.base, self.name))
        self.stack.enter_context(full_precision(self.base))

    def __exit__(self, *exception: object) -> None:
        self.stack.close()
