"""Networks sharded over processes (FSDP2), and put together again.

A sharded network stays the object that it is: its parameters become DTensors, of which each process holds some rows, and the
whole weights of a unit are there only while it runs (Zhao et al. 2023, arXiv 2304.11277; torch's `fully_shard`).
accelerate's own preparation for FSDP2 takes one network and its optimiser alone, and only on accelerators.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from .denoiser import body, unwrap
from .fsdp import DTensor, FSDPModule, distribute_tensor, fully_shard

ALONE = {"CombinedTimestepLabelEmbeddings"}
"""Classes of modules that networks also call from outside the block that holds them, as DiT does."""


def shard(network: nn.Module) -> None:
    """Shard a network in place, a unit at a time; its weights are the same in every process, and so they stay.

    Every unit is whole while it runs forward or backward, and sharded in between: the root too, of which torch would keep
    the weights from before an update. Raises ValueError for adapters, whose weights are those of a shared base.
    """
    if isinstance(network, FSDPModule):
        return
    if body(network) is not network:
        raise ValueError(f"a {type(network).__name__} cannot be sharded: launch this method with DDP")
    for unit in [*units(network), network]:
        fully_shard(unit, reshard_after_forward=True)


def units(network: nn.Module) -> list[nn.Module]:
    """The submodules whose weights are gathered together, inner ones first; what none of them holds is the network's own.

    They are the network's parts (children, and the members of its lists), and within them the blocks that its class in
    diffusers declares not to be split. No weights are then left to the network itself but what it uses beside its parts: a
    backward pass that begins at features in its middle never comes through its output, where its own would be gathered.
    """
    blocks = ALONE | set((network._no_split_modules or ()) if isinstance(network, ModelMixin) else ())
    found = {id(each) for each in network.modules() if type(each).__name__ in blocks}
    found |= {id(part) for child in network.children() for part in _parts(child)}
    inner_first = reversed([*network.modules()][1:])
    return [each for each in inner_first if id(each) in found and next(each.parameters(), None) is not None]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    # lists are never called: their members are; and what a Sequential returns may be a view, which hooks do not bear
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        for each in module.children():
            yield from _parts(each)
    else:
        yield module


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradient down to the norm `limit`; returns the norm that it had, of all shards together."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def finite(network: nn.Module) -> bool:
    """Whether all weights of this process are finite."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in network.parameters())
    return all(bool(p.isfinite().all()) for p in local)


# ---- whole again


class Whole:
    """A network or an optimiser as checkpoints know it: as if it were in one process.

    `gather` is called by all processes; after it `state_dict` is the whole state in the main process. `load_state_dict` is
    called by all processes with the whole state.
    """

    def __init__(self, sharded: Any):
        self.sharded = sharded
        self.state: dict[str, Any] = {}

    def gather(self, main: bool) -> "Whole":
        self.state = whole(self.sharded.state_dict(), main)
        return self

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        if isinstance(self.sharded, nn.Module):
            self.sharded.load_state_dict(_as(self.sharded.state_dict(), state), strict=strict)
            return
        parameters = [p for group in self.sharded.param_groups for p in group["params"]]
        slots = {i: _as(dict.fromkeys(each, parameters[i]), each) for i, each in state["state"].items()}
        self.sharded.load_state_dict({**state, "state": slots})


def whole(state: Any, main: bool) -> Any:
    """A nested state with every DTensor put together, on the CPU; of the tensors only the main process keeps them."""
    if isinstance(state, dict):
        return {key: whole(value, main) for key, value in state.items()}
    if not isinstance(state, Tensor):
        return state
    value = state.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.cpu() if main else value.new_empty(0)


def _as(like: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of `state`, each spread as the one in `like` is that has its name and shape."""
    return {
        key: distribute_tensor(value.to(like[key].device), like[key].device_mesh, like[key].placements)
        if isinstance(like.get(key), DTensor) and value.shape == like[key].shape
        else value
        for key, value in state.items()
    }


def outline(network: nn.Module) -> nn.Module:
    """A copy of a network, made before it is sharded, whose parameters have shapes and no memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in network.parameters()}
    return copy.deepcopy(unwrap(network), memo)


def filled(outline: nn.Module, state: dict[str, Tensor], device: torch.device) -> nn.Module:
    """The network of an outline with a whole state."""
    network = copy.deepcopy(outline)
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False).to(device)
