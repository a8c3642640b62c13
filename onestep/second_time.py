"""A second time as an input of a network that has but one: where a jump ends, beside where it starts.

The first layer of every time embedding, h = W e + b for the features e of the time t, becomes h = W e + b + U f for the
features f of the second time s. U starts at zero, so that the network starts as it was. For a fixed s the last term is a
bias, which makes the network one of its own class again: `folded`.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from .denoiser import Call, Cond

KEY = "second_time"
"""Name of the second time among a batch's conditions: a fraction of the schedule, shape (B,), 0 being clean data."""
WEIGHT = "second_weight"
FEATURES = 64
EMBEDDERS = ("time_embedding", "timestep_embedder")
FIRST_LAYERS = ("map_layer0",)


class Holder:
    """The second time of the pass to come, shared by all layers of one network; None is 0 for every sample."""

    value: Tensor | None = None


class TimedLinear(nn.Linear):
    """y = W x + b + U f(s), f the 64 sines and cosines of 1000 s."""

    def __init__(self, linear: nn.Linear, holder: Holder):
        super().__init__(linear.in_features, linear.out_features, bias=True, device="meta")
        self.weight, self.holder = linear.weight, holder
        bias = torch.zeros_like(self.weight[:, 0]) if linear.bias is None else linear.bias
        self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.second_weight = nn.Parameter(self.weight.new_zeros(linear.out_features, FEATURES))

    def shift(self, second: Tensor) -> Tensor:
        """U f(s), shape (B, out)."""
        features = get_timestep_embedding(1000 * second.float(), FEATURES).to(self.second_weight.dtype)
        return F.linear(features, self.second_weight)

    def forward(self, x: Tensor) -> Tensor:
        second = self.holder.value
        if second is None or len(second) != len(x):
            assert second is None, "the second time has another batch than the network's input"
            second = torch.zeros(len(x), device=x.device)
        return super().forward(x) + self.shift(second)


def add_second_time(network: nn.Module) -> None:
    """Give a network a second time, in place. Raises ValueError where it has no time embedding that is known here."""
    holder = Holder()
    for path, module in list(network.named_modules()):
        name = path.rsplit(".", 1)[-1]
        if name in EMBEDDERS and isinstance(module, TimestepEmbedding):
            module.linear_1 = TimedLinear(module.linear_1, holder)
        elif name in FIRST_LAYERS and isinstance(module, nn.Linear):
            parent: Any = network.get_submodule(path.rpartition(".")[0])
            setattr(parent, name, TimedLinear(module, holder))
    if not layers(network):
        raise ValueError(f"a {type(network).__name__} has no time embedding that can take a second time")


def layers(network: nn.Module) -> list[TimedLinear]:
    return [module for module in network.modules() if isinstance(module, TimedLinear)]


def timed(call: Call) -> Call:
    """`call` for networks that may have a second time, which is taken from the conditions; without one it is 0.

    A backward pass that recomputes activations sees the second time of the network's last pass: with gradient checkpointing
    let no other pass of the same network come between a pass and its backward.
    """

    def with_second(network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        rest = {key: value for key, value in cond.items() if key != KEY}
        for layer in layers(network):
            layer.holder.value = cond.get(KEY)
        return call(network, x, timestep, rest)

    return with_second


@torch.no_grad()
def folded(network: nn.Module, second: float = 0.0) -> nn.Module:
    """A network of the original class for one second time; the network itself where it has none."""
    if not layers(network):
        return network
    network = copy.deepcopy(network)
    for path, module in list(network.named_modules()):
        if not isinstance(module, TimedLinear):
            continue
        plain = nn.Linear(module.in_features, module.out_features, device="meta")
        shift = module.shift(torch.tensor([second], device=module.weight.device))[0]
        plain.weight, plain.bias = module.weight, nn.Parameter(module.bias + shift, module.bias.requires_grad)
        parent: Any = network.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rsplit(".", 1)[-1], plain)
    return network
