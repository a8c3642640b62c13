"""A network as a denoiser: (x_t, t, cond) -> x0, whatever it predicts and however it is conditioned."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .compiling import eagerly
from .fsdp import FSDPModule
from .guided import KEY, Guided
from .lora import Adapter
from .precision import full_precision
from .prediction import Prediction
from .rng import Rng
from .schedule import Schedule

Cond = dict[str, Tensor]
"""What a network is conditioned on, by the network's argument names; every tensor has the batch as first dimension."""

Call = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
"""How a family of networks is called: (network, input, timestep, cond) -> raw output."""


def call_network(network: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """diffusers' own calling convention, right for every network whose conditioning arguments are plain tensors."""
    return network(x, timestep=timestep, return_dict=False, **cond)[0]


def stack(*conds: Cond) -> Cond:
    """Conditions of several batches as those of one."""
    return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}


class Denoiser(nn.Module):
    """x0 = denoiser(x_t, t, cond): bare network + schedule + prediction type.

    x_t has shape (B, C, ...), t shape (B,) in the schedule's time. Output channels beyond C (a learned variance) are
    ignored. The network is given float32 at least, whatever its weights are stored in, see
    `onestep.precision`; the conversion to x0 runs in x_t's dtype, float32 at least.
    `network` may be replaced by a distributed wrapper of itself. `taps` name the submodules `features` reads, and
    `tap_output` which of their outputs where they have several.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        call: Call = call_network,
        taps: Sequence[str] = (),
        tap_output: int = 0,
    ):
        super().__init__()
        self.network, self.schedule, self.prediction, self.call = network, schedule, prediction, call
        self._taps, self._tap_output = tuple(taps), tap_output
        weight = next(body(network).parameters(), None)
        self.dtype = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)

    def output(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        network: nn.Module | None = None,
        coefficients: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The network's raw output at x_t, shape of x_t, in x_t's dtype. `coefficients` are the schedule's, if at hand."""
        alpha_t, sigma_t = coefficients or self.schedule(t, x_t)
        x_in = self.prediction.scale_input(x_t, alpha_t, sigma_t).to(self.dtype)
        with full_precision(body(self.network)):
            out = self.call(network or self.network, x_in, self.schedule.timestep(t), cond)
        return out[:, : x_t.shape[1]].to(alpha_t.dtype)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        coefficients = self.schedule(t, x_t)
        return self.prediction.to_x0(self.output(x_t, t, cond, coefficients=coefficients), x_t, *coefficients)

    def loss(self, x_0: Tensor, cond: Cond, rng: Rng, t: Tensor | None = None) -> Tensor:
        """Denoising score matching, mean over batch and elements of weight * (output - target)^2.

        The noise levels are uniform over the schedule's times unless `t`, shape (B,), is given.
        """
        t = self.schedule.at(rng.uniform()) if t is None else t
        eps = rng.normal(x_0.shape[1:]).to(x_0.dtype)
        alpha_t, sigma_t = coefficients = self.schedule(t, x_0)
        output = self.output(alpha_t * x_0 + sigma_t * eps, t, cond, coefficients=coefficients)
        error = output - self.prediction.target(x_0, eps, alpha_t, sigma_t)
        return (self.prediction.weight(alpha_t, sigma_t) * error.square()).mean()

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Outputs of the tapped submodules at x_t; the network is not run past the last of them.

        The bare network is called, also where `network` is a distributed wrapper: gradients reach the same parameters,
        and the wrapper's own bookkeeping belongs to whole forwards.
        """
        if isinstance(self.network, FSDPModule):  # a pass cut short would leave parts of it unsharded
            return self.with_features(x_t, t, cond)[1]
        with self._tapped(stop=True) as found:
            try:
                self.output(x_t, t, cond, network=unwrap(self.network))
            except Stop:
                return found
        raise AssertionError("the network ended before every tap was reached")

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        """(x0, outputs of the tapped submodules) from one whole pass of the bare network."""
        coefficients = self.schedule(t, x_t)
        with self._tapped(stop=False) as found:
            output = self.output(x_t, t, cond, unwrap(self.network), coefficients)
        assert len(found) == len(self._taps), "the network ended before every tap was reached"
        return self.prediction.to_x0(output, x_t, *coefficients), found

    def loss_with_features(self, x_0: Tensor, cond: Cond, rng: Rng) -> tuple[Tensor, list[Tensor]]:
        """(`loss`, outputs of the tapped submodules) from one whole pass, which is that of `loss`."""
        with self._tapped(stop=False) as found:
            loss = self.loss(x_0, cond, rng)
        assert len(found) == len(self._taps), "the network ended before every tap was reached"
        return loss, found

    @contextmanager
    def _tapped(self, stop: bool) -> Iterator[list[Tensor]]:
        """A list that the taps' outputs are put into; `stop` ends the pass by Stop once it is complete."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, result: Any) -> None:
            found.append(result[self._tap_output] if isinstance(result, tuple) else result)
            if stop and len(found) == len(self._taps):
                raise Stop

        with ExitStack() as hooks:
            hooks.enter_context(eagerly(unwrap(self.network)))
            for tap in self._taps:
                hooks.enter_context(body(self.network).get_submodule(tap).register_forward_hook(keep))
            yield found


def guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond | None, guidance: Tensor | float | None
) -> Tensor:
    """x0_uncond + guidance (x0_cond - x0_uncond), one pass over the doubled batch; None is no guidance and half the pass.

    As a tensor of shape (B, 1, ...) every sample has its own guidance. A network with guidance adapters does it in half.
    """
    if guidance is None:
        return denoiser(x_t, t, cond)
    if isinstance(unwrap(denoiser.network), Guided):
        one = guidance.flatten() if isinstance(guidance, Tensor) else torch.full((1,), guidance, device=x_t.device)
        return denoiser(x_t, t, cond | {KEY: one})
    assert uncond is not None
    x_cond, x_uncond = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), stack(cond, uncond)).chunk(2)
    return x_uncond + guidance * (x_cond - x_uncond)


class Stop(Exception):
    """Ends a forward pass once its features are known."""


def unwrap(network: nn.Module) -> nn.Module:
    """The bare network behind a DistributedDataParallel wrapper, or the network itself."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def body(network: nn.Module) -> nn.Module:
    """The module that does the arithmetic: an adapter's base, else the bare network."""
    bare = unwrap(network)
    return bare.base if isinstance(bare, Adapter | Guided) else bare


def held(denoiser: Denoiser) -> Denoiser:
    """A frozen copy, such as of a student for `follow`."""
    network = copy.deepcopy(denoiser.network).requires_grad_(False)
    return Denoiser(network, denoiser.schedule, denoiser.prediction, denoiser.call)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """One step of an exponential moving average of the weights: average <- decay average + (1 - decay) network."""
    averaged = [p.detach() for p in average.parameters()]
    torch._foreach_lerp_(averaged, [p.detach() for p in unwrap(network).parameters()], 1 - decay)


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """No parameter of `modules` receives a gradient inside; gradients still flow through their inputs."""
    parameters = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
