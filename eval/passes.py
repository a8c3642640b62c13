"""What an update really asks of its networks, recorded as it runs, and the same calls made again without anything else."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo import roles

from onestep.compiling import eagerly
from onestep.denoiser import Denoiser, Stop, body, follow, unwrap
from onestep.discriminator import Discriminator
from onestep.guided import Guided
from onestep.jvp import forward
from onestep.precision import full_precision
from onestep.trainer import Trainer

FORWARD, FULL, INPUT, SLOPE = "forward", "forward + backward", "forward + input backward", "forward derivative"
"""Kinds of passes: without gradient; with that of the weights; with that of the input alone; with a tangent."""


@dataclass
class Pass:
    """One call of a network: its arguments, detached; by inputs of theirs that need one, a gradient is computed again."""

    role: str
    network: nn.Module
    given: tuple[tuple[Any, ...], dict[str, Any]]
    needs: list[bool]
    """Of every leaf of `given`, whether the gradient flows on through it."""
    tangents: list[Tensor | None]
    learns: bool
    """Whether a weight of the network wants a gradient."""
    guidance: Tensor | None = None
    stop: str | None = None
    """The submodule whose output ended it early."""
    backward: bool = False
    """Whether a gradient came back to its output."""
    seeds: list[Tensor] = field(default_factory=list)

    @property
    def kind(self) -> str:
        if any(each is not None for each in self.tangents):
            return SLOPE
        return FORWARD if not self.backward else FULL if self.learns else INPUT

    @property
    def rows(self) -> int:
        """Samples in it."""
        return next(len(leaf) for leaf in tree_leaves(self.given) if isinstance(leaf, Tensor) and leaf.ndim > 1)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        needs = iter(self.needs)
        return tree_map(lambda leaf: leaf.detach().requires_grad_() if next(needs) else leaf, self.given)

    def forward(self) -> list[Tensor]:
        """The outputs that a gradient is to come back to; none where the pass is without one."""
        if isinstance(self.network, Guided):
            self.network.guidance = self.guidance
        with full_precision(body(self.network)), torch.set_grad_enabled(self.backward):
            if self.kind == SLOPE:
                self._slope()
                return []
            args, kwargs = self.arguments()
            out = self._stopped(args, kwargs) if self.stop else self.network(*args, **kwargs)
        return [each for each in tree_leaves(out) if isinstance(each, Tensor) and each.requires_grad]

    def run(self) -> None:
        """Forward, and backward from a fixed gradient of the output, of the size that a mean has."""
        outputs = self.forward()
        if outputs:
            if not self.seeds:
                self.seeds = [torch.randn_like(each) / each.numel() for each in outputs]
            torch.autograd.backward(outputs, self.seeds)

    def _stopped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found: list[Any] = []

        def end(module: nn.Module, given: Any, result: Any) -> None:
            found.append(result)
            raise Stop

        assert self.stop is not None
        handle = body(self.network).get_submodule(self.stop).register_forward_hook(end)
        try:
            with eagerly(self.network):
                self.network(*args, **kwargs)
        except Stop:
            return found
        finally:
            handle.remove()
        raise AssertionError("the pass did not end where it ended before")

    def _slope(self) -> None:
        leaves, paths = tree_leaves(self.given), [i for i, each in enumerate(self.tangents) if each is not None]

        def call(*moved: Tensor) -> Tensor:
            by_place = dict(zip(paths, moved))
            numbered = iter(range(len(leaves)))
            args, kwargs = tree_map(lambda leaf: by_place.get(next(numbered), leaf), self.given)
            with eagerly(self.network):
                return tree_leaves(self.network(*args, **kwargs))[0]

        forward(call, [leaves[i] for i in paths], [each for each in self.tangents if each is not None])


class Tape:
    """The passes of a trainer's updates and the players' turns among them, in the order in which they came."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.events = trainer, list[Pass | str]()
        self._open: list[Pass] = []
        self._ended = ""
        self._networks = networks_of(trainer)

    @property
    def passes(self) -> list[Pass]:
        return [each for each in self.events if isinstance(each, Pass)]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Adds what updates call inside. A network that another one runs on, such as an adapter's base, is part of it."""
        trainer, apply = self.trainer, self.trainer._apply

        def applied(player: str) -> None:
            self.events.append(player)
            apply(player)

        with ExitStack() as hooks:
            for _, network in self._networks:
                hooks.enter_context(eagerly(network))  # compiled code has the hooks that there were when it was made
            parts = {id(part): (name, part) for _, net in self._networks for name, part in body(net).named_modules()}
            for name, part in parts.values():
                hooks.callback(part.register_forward_hook(partial(self._note, name)).remove)
            for role, network in self._networks:
                enter = partial(self._enter, role)
                hooks.callback(network.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
                hooks.callback(network.register_forward_hook(self._leave, always_call=True).remove)
            trainer._apply = applied  # type: ignore[method-assign]
            hooks.callback(lambda: trainer.__dict__.pop("_apply"))
            yield

    def _enter(self, role: str, network: nn.Module, args: Any, kwargs: Any) -> None:
        dual = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else None for x in tree_leaves((args, kwargs))]
        leaves = tree_leaves((args, kwargs))
        plain = iter([x if each is None else each.primal.detach() for x, each in zip(leaves, dual)])
        on = torch.is_grad_enabled()
        self._open.append(
            Pass(
                role=role,
                network=network,
                given=tree_map(lambda _: next(plain), (args, kwargs)),
                needs=[on and isinstance(x, Tensor) and x.requires_grad for x in leaves],
                tangents=[None if each is None else each.tangent for each in dual],
                learns=on and any(p.requires_grad for p in network.parameters()),
                guidance=network.guidance if isinstance(network, Guided) else None,
            )
        )
        if len(self._open) == 1:
            self.events.append(self._open[0])

    def _note(self, name: str, module: nn.Module, args: Any, result: Any) -> None:
        # hooks run in the order of their making: one that ends the pass comes after this
        if self._open:
            self._ended = name
            self._watch(self._open[0], result)

    def _leave(self, network: nn.Module, args: Any, result: Any) -> None:
        mine = self._open.pop()
        if result is None:
            mine.stop = self._ended

    def _watch(self, mine: Pass, result: Any) -> None:
        """A gradient that comes back to what a submodule puts out has come through the pass."""
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.requires_grad and torch.is_grad_enabled():
                each.register_hook(lambda _: setattr(mine, "backward", True))


class Bare:
    """The recorded passes once more, each with its backward pass right behind it, and at a player's turn its update.

    An update is what no trainer can leave out: the clipped gradient norm, the optimiser's step, the gradients set to None,
    the student's average, and the method's own averages. Learning rates are zero, so that all this changes no weight.
    """

    def __init__(self, tape: Tape):
        self.trainer, self.events, self.passes = tape.trainer, tape.events, tape.passes

    def __call__(self) -> None:
        for event in self.events:
            if isinstance(event, str):
                self._update(event)
            else:
                self.one(event, event.run)

    def one(self, each: Pass, call: Callable[[], Any]) -> Any:
        """`call` in the arithmetic of the run, with the weights trained or frozen as they were."""
        own = [p for p in each.network.parameters() if p.requires_grad] if each.backward and not each.learns else []
        for parameter in own:
            parameter.requires_grad_(False)
        config = self.trainer.config
        device = self.trainer.accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.mixed_precision == "bf16", cache_enabled=False):
            result = call()
        for parameter in own:
            parameter.requires_grad_(True)
        return result

    def _update(self, player: str) -> None:
        trainer, optimizer = self.trainer, self.trainer.optimizers[player]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, trainer.config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if player == "generator":
            follow(trainer.average, trainer.generator.denoiser.network, trainer.config.ema)
        trainer.objective.updated(player)


def networks_of(trainer: Trainer) -> list[tuple[str, nn.Module]]:
    """Every network that a step may call, once, with its role; the heads of a GAN are one of their own."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for role, member in roles(trainer):
        network = unwrap(member.network) if isinstance(member, Denoiser | Discriminator) else member
        found.setdefault(id(network), ("head" if isinstance(member, Discriminator) else role, network))
    return list(found.values())
