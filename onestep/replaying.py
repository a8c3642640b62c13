"""The step of a run that was not finite, once more, and its first tensor that is not.

Every draw is a function of seed and step: from the last checkpoint on, the steps come out as they did before.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .data import Data
from .files import replaced, save_tensors
from .nonfinite import ADVICE, NonFinite
from .objectives.base import Batch
from .probe import Probe
from .replay import BATCHES
from .saved import saved_options
from .trainer import Trainer


class WithBatch(Data):
    """The data of a run, but for one step the batch that was saved."""

    def __init__(self, data: Data, step: int, conditions: Tensor, real: Tensor | None):
        self.__dict__.update(data.__dict__)
        self.step, self._conditions, self._real = step, conditions, real

    def batch(self, step: int, total: int, start: int, stop: int, device: torch.device | str) -> Batch:
        drawn = super().batch(step, total, start, stop, device)
        if step != self.step:
            return drawn
        real = None if drawn.real is None or self._real is None else self._real[start:stop].to(drawn.real)
        return Batch(self._conditions[start:stop].to(drawn.conditions), real, drawn.rng)


def repeat(trainer: Trainer, bad: NonFinite) -> str | None:
    """Train from the last checkpoint through the bad step, and say what is the first tensor that is not finite.

    None where all numbers are finite this time. All processes call it alike. The trainer is of no use afterwards.
    Raises ValueError where the last checkpoint is of a later step.
    """
    trainer.watch.main = False
    trainer.resume()
    if trainer.step > bad.step:
        raise ValueError(f"{trainer.folder} has gone on to step {trainer.step}: step {bad.step + 1} cannot be repeated")
    while trainer.step <= bad.step:
        probe = Probe(trainer)
        if found := agreed(probe.weights()):
            return found
        if trainer.step == bad.step:
            with probe.hooked():
                trainer.update()
        else:
            trainer.update()
        if found := agreed(probe.found):
            return found
        trainer.step += 1
    return agreed(Probe(trainer).weights())


def agreed(found: str | None) -> str | None:
    """What the first process that has found something has found."""
    if not (dist.is_available() and dist.is_initialized()):
        return found
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, found)
    return next((one for one in each if one is not None), None)


def located(trainer: Trainer, bad: NonFinite) -> NonFinite:
    """`bad` with the name of the first tensor that is not finite, once its batch is saved. `trainer` is a fresh one.

    Where that goes wrong itself, the error says so too.
    """
    try:
        path = trainer.folder / BATCHES / f"step-{bad.step + 1:08d}.safetensors"
        if trainer.accelerator.is_main_process:
            keep_batch(trainer, bad.step, path)
        found = repeat(trainer, bad)
    except (RuntimeError, ValueError, OSError) as error:
        return NonFinite(bad.what, bad.step, bad.player, f"repeating the step failed: {error}; {ADVICE}")
    then = f"its batch is in {path}, and python -m onestep.replay {trainer.folder} repeats it; {ADVICE}"
    if found is None:
        return NonFinite(bad.what, bad.step, bad.player, f"it was finite when it was repeated; {then}")
    return NonFinite(found, trainer.step, bad.player, then)


def keep_batch(trainer: Trainer, step: int, path: Path) -> None:
    """Write conditions and real samples of a whole batch to a safetensors file, whole or absent."""
    config = trainer.config
    batch = trainer.data.batch(step, config.batch_size, 0, config.batch_size, trainer.teacher.device)
    tensors = {"conditions": batch.conditions} | ({} if batch.real is None else {"real": batch.real})
    path.parent.mkdir(exist_ok=True)
    with replaced(path) as partial:
        save_tensors(tensors, partial, {"step": str(step + 1), "seed": str(config.seed)})


def read_batch(path: Path) -> tuple[int, Tensor, Tensor | None]:
    """(updates done before it, conditions, real) of a file that `keep_batch` wrote. Raises ValueError for another one."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return int((file.metadata() or {})["step"]) - 1, tensors["conditions"], tensors.get("real")
    except (OSError, SafetensorError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is no batch of a step that was not finite ({error}); name one in RUN/{BATCHES}") from error


def trainer_of(run: Path) -> Trainer:
    """A run's trainer, made again from its config.yaml. Raises ValueError where it is no run."""
    from .run import make_trainer

    config, options = saved_options(run)
    return make_trainer(replace(config, output=str(run if config.only is None else run.parent)), options)
