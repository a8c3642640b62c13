"""Which tensor of an update is the first that is not finite: batch, weights, inputs, layers, losses, gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .denoiser import body
from .fsdp import DTensor
from .nonfinite import Watch

if TYPE_CHECKING:
    from .trainer import Trainer


class Probe:
    """Looks at the networks of a trainer; `found` says in words what was not finite first, or is None."""

    def __init__(self, trainer: "Trainer"):
        from .trainer import bare  # which knows the watch, not the probe

        self.trainer = trainer
        self.networks: dict[str, nn.Module] = {"teacher": body(trainer.teacher.denoiser.network)}
        for player, members in trainer.members.items():
            for number, network in enumerate(bare(members)):
                self.networks[f"{player}-{number}" if number else player] = network
        self.networks |= trainer.objective.state()
        self.found: str | None = None

    def note(self, what: str, tensor: Tensor) -> None:
        """Remember `what`, if it is the first that is not finite. Of a sharded tensor each process looks at its own part."""
        if self.found is not None or not tensor.is_floating_point():
            return
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        bad = local[~local.isfinite()]
        if bad.numel():
            kind = "NaN" if bool(bad.isnan().any()) else "infinite"
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.found = f"{what} ({dtype}, shape {list(tensor.shape)}) is {kind} at {bad.numel():,} places"

    def weights(self) -> str | None:
        """What is not finite among the weights and buffers of all networks."""
        for network, module in self.networks.items():
            for name, tensor in module.state_dict().items():
                self.note(f"the weight {name} of the {network}", tensor)
        return self.found

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Look at everything that is computed inside, in its order; nothing is raised, so that processes stay together."""
        trainer, watch, handles = self.trainer, self.trainer.watch, list[RemovableHandle]()
        for network, module in self.networks.items():
            handles.append(module.register_forward_pre_hook(self._input(network), with_kwargs=True))
            handles += [each.register_forward_hook(self._output(name, network)) for name, each in module.named_modules()]
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(self._gradient(name, network)))
        trainer.watch = _Noting(self, watch)
        config = trainer.config
        batch = trainer.data.batch(trainer.step, config.batch_size, 0, config.batch_size, trainer.teacher.device)
        if batch.real is not None:
            self.note("the real data of the batch", batch.real)
        try:
            yield
        finally:
            trainer.watch = watch
            for handle in handles:
                handle.remove()

    def _input(self, network: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in tensors_in([args, kwargs]):
                self.note(f"an input of the {network}", tensor)

        return look

    def _output(self, name: str, network: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                self.note(f"the output of {f'the layer {name} of ' if name else ''}the {network}", tensor)

        return look

    def _gradient(self, name: str, network: str) -> Any:
        def look(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.note(f"the gradient of the weight {name} of the {network}", parameter.grad)

        return look


class _Noting(Watch):
    """Tells a probe of losses and norms, and whose turn it was when the first tensor was not finite."""

    def __init__(self, probe: Probe, watch: Watch):
        super().__init__(watch.players, "cpu")
        self.probe, self.told = probe, False

    def loss(self, step: int, player: str, loss: Tensor) -> None:
        self.probe.note("the loss", loss)
        self._turn(player)

    def allows(self, step: int, player: str, norm: Tensor) -> bool:
        self.probe.note("the gradient's norm", norm)
        self._turn(player)
        return True

    def _turn(self, player: str) -> None:
        if self.probe.found is not None and not self.told:
            self.probe.found, self.told = f"{self.probe.found}, in the turn of the {player}", True


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
