"""Networks compiled by torch.compile, in place: the names of their weights stay, so that checkpoints and exports do too."""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]


def compile_networks(networks: Iterable[nn.Module]) -> None:
    """Compile each network's calls, at the first of each kind. Where that fails they run as they are, told in one line.

    Raises ValueError where torch is too old to leave compiled code for a while.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError("--compile needs torch 2.6 or later: type pip install -U torch, or leave it out")
    backend = or_as_they_are(torch._dynamo.lookup_backend("inductor"))
    for network in networks:
        network.compile(backend=backend)


def or_as_they_are(backend: Backend) -> Backend:
    """`backend`, but for graphs that it fails at, of which the first is told; those are run one operation after another."""
    told = False

    def made(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal told
        try:
            return backend(graph, inputs)
        except Exception as error:  # a compiler's errors are of many kinds
            if not told:
                reason = " ".join(str(error).split())[:200]
                print(f"warning: --compile failed, training goes on without it: {reason}", file=sys.stderr)
            told = True
            return graph.forward

    return made


def eagerly(network: nn.Module) -> AbstractContextManager[Any]:
    """Inside, a compiled network runs as it is written: compiled code knows no hooks and no forward derivatives."""
    return nullcontext() if network._compiled_call_impl is None else torch.compiler.set_stance("force_eager")
