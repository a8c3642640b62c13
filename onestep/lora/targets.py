"""Which layers are adapted."""

from collections.abc import Sequence
from difflib import get_close_matches

from peft.tuners.lora import LoraLayer
from torch import nn

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # the text stream of SD3 and Flux
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    "affine",  # modulations of EDM's networks, whose convolutions are no nn.Conv2d and are not adapted
)
"""Layers that are adapted by default: in UNets those of LCM-LoRA (Luo et al. 2023), in transformers their counterparts."""


def default_targets(network: nn.Module) -> tuple[str, ...]:
    """Those of TARGETS that `network` has. Raises ValueError where it has none."""
    layers = adaptable(network)
    found = tuple(target for target in TARGETS if any(_matches(layer, target) for layer in layers))
    if not found:
        hint = f"name some, for example {','.join(layers[:2])}" if layers else "it has no linear layer or convolution"
        raise ValueError(f"no layer of a {type(network).__name__} is adapted by default; {hint}")
    return found


def chosen(network: nn.Module, targets: str | Sequence[str] | None) -> tuple[str, ...]:
    """Full names of the layers that are called by `targets`, or end in .target; a string is separated by commas.

    None stands for `default_targets(network)`. Raises ValueError for a target that no layer is called by.
    """
    if targets is None:
        targets = default_targets(network)
    wanted = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else list(targets)
    layers = adaptable(network)
    ends = {end for layer in layers for end in _ends(layer)}
    for target in wanted:
        if target not in ends:
            short = sorted({end for layer in layers for end in _ends(layer)[-3:]})
            near = get_close_matches(target, short, 3, cutoff=0.4) or short[:3]
            raise ValueError(
                f"no linear layer or convolution of the {type(network).__name__} is called {target!r}; "
                f"near are {', '.join(near)}"
            )
    return tuple(layer for layer in layers if not set(_ends(layer)).isdisjoint(wanted))


def adaptable(network: nn.Module) -> list[str]:
    """Names of the linear layers and convolutions of the original network, whether they are adapted already or not."""
    found: list[str] = []
    inside = None
    for name, module in network.named_modules():
        if inside is not None and name.startswith(inside):
            continue  # the original layer in its wrapper, and the adapters beside it
        if isinstance(module, LoraLayer):
            inside = name + "."
        if isinstance(module, (nn.Linear, nn.Conv2d, LoraLayer)):
            found.append(name)
    return found


def _matches(layer: str, target: str) -> bool:
    return target in _ends(layer)


def _ends(layer: str) -> list[str]:
    """Ends of a layer's name at its dots, the longest first: a.b.c, b.c, c."""
    parts = layer.split(".")
    return [".".join(parts[k:]) for k in range(len(parts))]
