"""Which of a base's adapters runs."""

from weakref import WeakKeyDictionary

from peft.tuners.lora import LoraLayer
from torch import nn


def lora_layers(base: nn.Module) -> list[LoraLayer]:
    """Every layer of `base` that carries an adapter."""
    return [module for module in base.modules() if isinstance(module, LoraLayer)]


def names(base: nn.Module) -> list[str]:
    """Names of the adapters on `base`."""
    return sorted({name for layer in lora_layers(base) for name in layer.lora_A})


def unused(base: nn.Module, name: str) -> str:
    """`name` where no adapter of `base` has it, else the first that is free of name_2, name_3, ..."""
    taken, number, free = names(base), 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


class active:
    """Within it, calls of `base` run with the adapter called `name`, or plain for None; it nests and can be re-entered.

    Outside of all of them the base is plain: its layers then run nothing but the original ones.
    """

    def __init__(self, base: nn.Module, name: str | None):
        self.switch, self.name = switch_of(base), name
        self.before: list[str | None] = []

    def __enter__(self) -> None:
        self.before.append(self.switch.name)
        self.switch.turn(self.name)

    def __exit__(self, *exception: object) -> None:
        self.switch.turn(self.before.pop())


def active_name(base: nn.Module) -> str | None:
    """Name of the adapter that `base` runs with now, or None."""
    return switch_of(base).name


class Switch:
    """The name of the active adapter, and the layers that act on it."""

    def __init__(self, base: nn.Module):
        self.name: str | None = None
        self.collect(base)

    def collect(self, base: nn.Module) -> None:
        """Find the layers with adapters anew, and bring them all to the present state."""
        self.states = [vars(layer) for layer in lora_layers(base)]
        self.turn(self.name)

    def turn(self, name: str | None) -> None:
        # not by peft's set_adapter and enable_adapters: these change which parameters require gradients, also those
        # of a graph that is yet to be walked back, and do so slowly
        off, chosen = name is None, [name]
        for state in self.states:
            state["_disable_adapters"], state["_active_adapter"] = off, chosen
        self.name = name


_SWITCHES: WeakKeyDictionary[nn.Module, Switch] = WeakKeyDictionary()


def switch_of(base: nn.Module) -> Switch:
    """The one switch of `base`."""
    if base not in _SWITCHES:
        _SWITCHES[base] = Switch(base)
    return _SWITCHES[base]
