"""What an update allocates: a method's own step, forward and backward, while every allocation is counted."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import TrainConfig
from .objectives import Batch, Objective


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside, as long as it is alive, real or fake.

    `known` tensors were there before. `peak` is the most that was alive at once, `gradients_at_peak` what of it was in
    the gradients of the parameters that are `watch`ed.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self._graded: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, partial(self._drop, key, size))
        self.live += size
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients

    def _drop(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self._alive[key]

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count the gradients of these parameters as such, from now on."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        if id(parameter) not in self._graded and parameter.grad is not None:
            self._graded[id(parameter)] = parameter.grad.untyped_storage().nbytes()
            self.gradients += self._graded[id(parameter)]

    def restart(self) -> None:
        """Look for a new peak."""
        self.peak, self.gradients_at_peak = self.live, self.gradients

    def clear(self, parameters: Iterable[nn.Parameter]) -> None:
        """What `zero_grad` does."""
        for parameter in parameters:
            parameter.grad = None
            self.gradients -= self._graded.pop(id(parameter), 0)


@dataclass
class Turn:
    """What one player's turn needs beside weights, averages and optimiser states, in bytes; the most over its turns."""

    kept: int = 0
    """Alive when the forward pass has ended: what is kept for the backward pass, without gradients."""
    peak: int = 0
    """The most at any moment, gradients included."""
    gradients: int = 0
    """Of `peak`, what is in gradients."""


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers of all these modules, each once."""
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return list(found.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def turns_of(
    objective: Objective,
    members: dict[str, list[nn.Module]],
    config: TrainConfig,
    batch: Callable[[int], Batch],
    modules: Iterable[nn.Module],
) -> dict[str, Turn]:
    """The players' turns in as many updates as it takes for each of them to have one; weights stay as they are."""
    parameters = {player: [p for each in networks for p in each.parameters()] for player, networks in members.items()}
    found: dict[str, Turn] = {}
    rules = nullcontext() if config.device == "cpu" else as_on_accelerators()
    with Ledger(tensors_of(*modules)) as ledger, rules:
        ledger.watch(p for each in parameters.values() for p in each)
        for step in range(objective.settled, objective.settled + 8):
            # a second micro-batch finds the gradients and the samples of the first, and is all that a third one finds
            earlier = [objective.step(batch(step), step)] if config.accumulation > 1 else []
            turns = objective.step(batch(step), step)
            ledger.restart()
            while True:
                for each in earlier:
                    if first := advance(each, config):
                        (first[1] / config.accumulation).backward()
                    del first
                if not (turn := advance(turns, config)):
                    break
                player, loss = turn
                mine = found.setdefault(player, Turn())
                mine.kept = max(mine.kept, ledger.live - ledger.gradients)
                (loss / config.accumulation).backward()
                if ledger.peak > mine.peak:
                    mine.peak, mine.gradients = ledger.peak, ledger.gradients_at_peak
                ledger.clear(parameters[player])
                ledger.restart()
            if found.keys() >= members.keys():
                break
    return found


def advance(turns: Iterator[tuple[str, Tensor]], config: TrainConfig) -> tuple[str, Tensor] | None:
    """As `Trainer._next`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16", cache_enabled=False):
        return next(turns, None)


@contextmanager
def as_on_accelerators() -> Iterator[None]:
    """Autocast on the CPU runs in float32 what it does on CUDA; by itself it runs these in bfloat16."""
    operators = torch.ops.aten
    wide: dict[str, Any] = {
        "layer_norm": operators.layer_norm.default,
        "group_norm": operators.group_norm.default,
        "softmax.int": operators.softmax.int,
        "softplus": operators.softplus.default,
    }

    def full(operator: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operator(*map(_wide, args), **{name: _wide(each) for name, each in kwargs.items()})

    # in the dispatcher, and so in force where blocks are recomputed in the backward pass too
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, operator in wide.items():
            library.impl(name, partial(full, operator), "AutocastCPU")
        yield


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
