"""A frozen network with guidance adapters, called as the network is, with its guidance as one more condition."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .lora.targets import TARGETS
from .pipelines.adapter_guidance import GuidanceAdapter, attached, widths_of

KEY = "adapter_guidance"
"""Name of the guidance among a batch's conditions, shape (B,) or (1,); without it the network runs without adapters."""

SITES: dict[str, tuple[str, str]] = {
    "DiTTransformer2DModel": ("attn1", "norm1.emb"),
    "PixArtTransformer2DModel": ("attn2", "adaln_single.emb"),
    "SD3Transformer2DModel": ("attn", "time_text_embed"),
    "SanaTransformer2DModel": ("attn2", "time_embed.emb"),
    "UNet2DConditionModel": ("attn2", "time_embedding"),
}
"""By a network's class: which attention of a block is adapted, and what embeds the time, with the class if any; how their
paths end. A DiT embeds it in every block."""


class Guided(nn.Module):
    """`base` with its adapters, at the guidance that `told` puts in `guidance`; plain where that is None.

    Only the adapters are registered: the base is frozen and shared. A deepcopy has adapters of its own on the same base.
    """

    def __init__(self, base: nn.Module, adapter: GuidanceAdapter):
        super().__init__()
        self.adapter = adapter
        self.guidance: Tensor | None = None
        self._base = (base,)  # in a tuple: its parameters are not this module's

    @property
    def base(self) -> nn.Module:
        """The shared network."""
        return self._base[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.guidance is None:
            return self.base(*args, **kwargs)
        with attached(self.base, self.adapter, self.guidance):
            return self.base(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guided":
        twin = Guided(self.base, copy.deepcopy(self.adapter, memo))
        memo[id(self)] = twin
        return twin.train(self.training)


Caller = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], Tensor]


def told(call: Caller) -> Caller:
    """`call` for a Guided network, or a distributed wrapper of one: its guidance is taken from the conditions."""

    def with_guidance(network: nn.Module, x: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        bare: Any = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
        bare.guidance = cond.get(KEY)
        return call(network, x, timestep, {name: value for name, value in cond.items() if name != KEY})

    return with_guidance


def adapter_for(
    network: Any, kind: str, hidden: int, share: float, pipeline: str, limits: tuple[float, float], seed: int = 0
) -> GuidanceAdapter:
    """New adapters of that kind for a network, which change nothing yet; `hidden` 0: as wide as `share` of its parameters.

    Raises ValueError for a class of network that is not in SITES.
    """
    name = type(network).__name__
    if name not in SITES:
        raise ValueError(
            f"no guidance adapters are known for a {name}; allowed are {', '.join(SITES)}: type another --teacher"
        )
    attention, embedder = SITES[name]
    layers = linear_layers(network) if kind == "low-rank" else ending(network, attention)
    embedders = ending(network, embedder)
    text = None if name == "DiTTransformer2DModel" else text_width(network)
    about: dict[str, Any] = {
        "kind": kind,
        "layers": layers,
        "widths": [widths_of(network.get_submodule(path)) for path in layers],
        "embedders": embedders,
        "time_width": time_width(network.get_submodule(embedders[0])),
        "text_width": text,
        "pipeline": pipeline,
        "low": limits[0],
        "high": limits[1],
    }
    wanted = share * count(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = GuidanceAdapter(hidden=hidden or width_for(about, wanted), **about)
    return made.to(next(network.parameters()).device)


def ending(network: nn.Module, *ends: str) -> list[str]:
    """Paths of the modules whose last names are one of these."""
    dotted = tuple(f".{end}" for end in ends)
    return [path for path, _ in network.named_modules() if f".{path}".endswith(dotted)]


def linear_layers(network: nn.Module) -> list[str]:
    """Paths of the linear layers that LoRA adapts by default, and of those that modulate a block."""
    return [path for path in ending(network, *TARGETS, "norm1.linear") if isinstance(network.get_submodule(path), nn.Linear)]


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def width_for(about: dict[str, Any], wanted: float) -> int:
    """The hidden width, a multiple of 8, with which adapters come nearest to `wanted` parameters; at least 8."""
    low, high = 1, 512
    with torch.device("meta"):
        while high - low > 1:
            middle = (low + high) // 2
            more = count(GuidanceAdapter(hidden=8 * middle, **about)) > wanted
            low, high = (low, middle) if more else (middle, high)
        sizes = {8 * n: count(GuidanceAdapter(hidden=8 * n, **about)) for n in (low, high)}
    return min(sizes, key=lambda hidden: abs(sizes[hidden] - wanted))


def time_width(embedder: nn.Module) -> int:
    """Width of what an embedding of diffusers puts out: that of its last linear layer."""
    return [module for module in embedder.modules() if isinstance(module, nn.Linear)][-1].out_features


def text_width(network: Any) -> int:
    """Width of the prompt tokens that a network of diffusers is called with."""
    config = network.config
    for name in ("caption_channels", "joint_attention_dim", "cross_attention_dim"):
        if config.get(name) is not None:
            return config[name]
    raise ValueError(f"a {type(network).__name__} without prompt tokens has no guidance adapters")
