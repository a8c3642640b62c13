"""An adapter as a network of its own."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .switch import active, lora_layers, names, switch_of, unused
from .targets import chosen


class Adapter(nn.Module):
    """The network `base` with W + (alpha / rank) B A in place of W in every adapted layer; it is called as `base` is.

    A is (rank, in), B (out, rank), in float32 at least whatever the base's dtype; a convolution has A of its own kernel
    and a B of 1x1. These alone are registered, under the layer's name: "mid_block.attentions.0.proj_in.lora_A".
    A starts uniform in +- 1/sqrt(fan in), a function of `seed`, and B at zero: the adapter starts as its base.

    The base is frozen and shared. It is not moved, cast or switched to training with its adapters, and where it is
    called directly it is still the plain network. A deepcopy is another adapter of the same base.
    """

    def __init__(
        self,
        base: nn.Module,
        name: str,
        rank: int,
        targets: str | Sequence[str] | None = None,
        alpha: float | None = None,
        seed: int = 0,
    ):
        """`name` tells the adapters of one base apart. `targets` are those of `chosen`; alpha None is `rank`.

        Raises ValueError for a target that the base does not have, for a rank below one and for a name in use.
        """
        super().__init__()
        layers = chosen(base, targets)
        if rank < 1:
            raise ValueError(f"rank {rank} is no rank of an adapter; allowed is 1 and more, for example 64")
        if not name.isidentifier() or name in names(base):
            raise ValueError(f"an adapter cannot be called {name!r}; allowed is any identifier but {names(base)}")
        self.name, self.rank, self.targets, self.alpha = name, rank, layers, float(rank if alpha is None else alpha)
        self._base = (base,)  # in a tuple: its parameters are not this module's
        _inject(base, name, rank, self.alpha, layers)
        source = torch.Generator().manual_seed(seed)
        for layer in layers:
            wrapper = base.get_submodule(layer)
            assert isinstance(wrapper, LoraLayer)
            parts: Any = {"lora_A": wrapper.lora_A[name], "lora_B": wrapper.lora_B[name]}
            for kind, part in parts.items():
                part.weight = nn.Parameter(_initial(part.weight, kind, source))
                _register(self, layer, kind, part.weight)

    @property
    def base(self) -> nn.Module:
        """The shared network."""
        return self._base[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with active(self.base, self.name):
            return self.base(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        twin = Adapter(self.base, unused(self.base, self.name), self.rank, self.targets, self.alpha)
        for theirs, ours in zip(twin.parameters(), self.parameters()):
            theirs.data = ours.detach().clone()
            theirs.requires_grad_(ours.requires_grad)
        memo[id(self)] = twin
        return twin.train(self.training)

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"{self.name}: rank {self.rank} in {len(self.targets)} layers, {count:,} parameters"


def _inject(base: nn.Module, name: str, rank: int, alpha: float, layers: Sequence[str]) -> None:
    """Add peft's layers under `name`; everything else of the base stays as it is, its adapters and its modes too."""
    switch = switch_of(base)
    required = {parameter: parameter.requires_grad for parameter in base.parameters()}
    modes = {module: module.training for module in base.modules()}
    # a pattern of full names: peft would let a list of ends match layers of other kinds too
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, layers)))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # it draws initial values, which are replaced
        inject_adapter_in_model(config, base, name)
    del base.peft_config  # needed no more, and the next injection would warn of it
    for parameter, value in required.items():  # older versions of peft freeze the others
        parameter.requires_grad_(value)
    for layer in lora_layers(base):
        layer.train(modes[layer.get_base_layer()])  # type: ignore[attr-defined]
    switch.collect(base)


def _initial(weight: Tensor, kind: str, source: torch.Generator) -> Tensor:
    values = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    if kind == "lora_A":
        values.uniform_(-1, 1, generator=source).div_(weight[0].numel() ** 0.5)
    return values.to(weight.device)


def _register(root: nn.Module, layer: str, kind: str, parameter: nn.Parameter) -> None:
    """Register `parameter` as layer.kind: modules have no names with dots, but can be a tree of them."""
    node = root
    for part in layer.split("."):
        if part not in dict(node.named_children()):
            node.add_module(part, nn.Module())
        node = node.get_submodule(part)
    node.register_parameter(kind, parameter)
