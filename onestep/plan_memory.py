"""Memory of a run before it starts: its own networks, on tensors without storage."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import TrainConfig
from .data.placeholders import placeholders
from .objectives import Batch, Objective, objective_class
from .plan_ledger import Ledger, Turn, bytes_of, tensors_of, turns_of
from .plan_teacher import Blank
from .rng import Rng
from .run import DTYPES, copies_of, guidance_of, new_student
from .teacher.text import TextTeacher
from .trainer import bare, rows_of

RUNTIME = {"cpu": 2_000_000_000, "accelerator": 800_000_000}
"""Bytes beside all tensors: a Python process with torch, diffusers and transformers imported; or a CUDA context with the
kernels that were loaded into it and the workspaces of cuBLAS and cuDNN."""


@dataclass
class Memory:
    """Bytes of a run on one device."""

    weights: dict[str, int]
    """By what holds them; networks that are shared are counted once."""
    optimizer: int
    average: int
    buckets: int
    """Copies of the gradients in which several processes exchange them."""
    pictures: int
    """What a grid shows of the teacher, where that is kept on the device."""
    runtime: int
    turns: dict[str, Turn] = field(default_factory=dict)
    """By player, and "grid" for the pictures that are drawn now and then; what is not here is not measured yet."""

    @property
    def fixed(self) -> int:
        """What is there all the time."""
        return sum(self.weights.values()) + self.optimizer + self.average + self.buckets + self.pictures + self.runtime

    @property
    def worst(self) -> Turn:
        return max(self.turns.values(), key=lambda turn: turn.peak, default=Turn())

    @property
    def total(self) -> int:
        return self.fixed + self.worst.peak


class Run:
    """The networks of a run, without weights, made by the code that makes them for training.

    Raises ValueError for options that do not fit the teacher or the number of processes.
    """

    def __init__(self, config: TrainConfig, options: Any, blank: Blank, processes: int = 1):
        self.config, self.processes = config, processes
        self.rows = rows_of(config, processes)
        self.teacher = blank.teacher(DTYPES[config.weights], config.resolution)
        self.teacher.copies = copies_of(config)
        method = objective_class(config.method)
        self.real = method.uses_real(options)
        with blank.weightless(), torch.random.fork_rng(devices=[]), placeholders():
            self.generator = new_student(config, options, self.teacher)
            guidance = guidance_of(config, self.teacher)
            self.objective: Objective = method(options, self.teacher, self.generator, guidance, Path(), Path())
        self.members = {name: bare(list(modules)) for name, modules in self.objective.players().items()}

    @property
    def modules(self) -> list[nn.Module]:
        parts = [part for part in self.teacher.pipeline.components.values() if isinstance(part, nn.Module)]
        return [*parts, *self.objective.kept(), *(network for networks in self.members.values() for network in networks)]

    def memory(self) -> Memory:
        """What is there all the time; `turns` are left empty."""
        student = self.generator.denoiser.network
        trained = [p for networks in self.members.values() for network in networks for p in network.parameters()]
        shared = self.processes > 1
        return Memory(
            weights=self._weights(),
            optimizer=optimizer_bytes(self.config.optimizer, trained),
            average=bytes_of(tensors_of(student)),
            buckets=bytes_of(trained) if shared else 0,
            pictures=self._pictures(),
            runtime=RUNTIME["cpu" if self.config.device == "cpu" else "accelerator"],
        )

    def _weights(self) -> dict[str, int]:
        network = self.teacher.denoiser.network
        names = {"teacher": network}
        away = () if self.config.device == "cpu" or not isinstance(self.teacher, TextTeacher) else self.teacher.encoders
        parts = {n: m for n, m in self.teacher.pipeline.components.items() if n not in away}
        names |= {f"teacher's {n}": m for n, m in parts.items() if isinstance(m, nn.Module)}
        for player, networks in self.members.items():
            names |= {f"{player} {type(each).__name__}": each for each in networks}
        names |= {f"{type(each).__name__} kept by the method": each for each in self.objective.kept()}
        own = {id(t) for networks in self.members.values() for each in networks for t in each.parameters()}
        counted: set[int] = set()
        found = {}
        for name, module in names.items():
            mine = [t for t in tensors_of(module) if id(t) not in counted]
            if module is network:  # adapters hang on it, and are their players'
                mine = [t for t in mine if id(t) not in own]
            counted |= {id(t) for t in mine}
            if mine:
                found[name] = bytes_of(mine)
        if self.config.offload and self.config.device != "cpu":  # a layer and the one that is fetched ahead
            found["teacher"] = 2 * max(bytes_of(list(each.parameters(recurse=False))) for each in network.modules())
        return found

    def _pictures(self) -> int:
        """Bytes of one side of a grid where it lies on the device: it is put together on the CPU."""
        channels, side = self.teacher.image_shape
        count = self.config.grid_columns * min(10, self.teacher.classes)
        return 4 * count * channels * side**2 if self.config.device == "cpu" else 0

    def batch(self, step: int) -> Batch:
        rng = Rng(self.config.seed, step, self.config.batch_size, 0, self.rows)
        real = torch.zeros(self.rows, *self.teacher.shape) if self.real else None
        return Batch(rng.integers(self.teacher.classes), real, rng)

    def turns(self) -> dict[str, Turn]:
        """The players' turns in an update."""
        with placeholders():
            return turns_of(self.objective, self.members, self.config, self.batch, self.modules)

    @torch.no_grad()
    def grid(self) -> Turn:
        """As `Trainer.draw`: pictures of the teacher, then of the average of the student, a micro-batch at once."""
        teacher, c = self.teacher, self.config
        rows = min(self.rows, c.grid_columns * min(10, teacher.classes))
        with Ledger(tensors_of(*self.modules)) as ledger:
            cond, uncond = teacher.encode(torch.zeros(rows, dtype=torch.long))
            z = Rng(c.seed, -1, rows).normal(teacher.shape)
            teacher.to_images(teacher(z, self.generator.time(0, z), cond, uncond, self.objective.guidance))
            teacher.to_images(self.generator.first(z, cond))
        return Turn(self._pictures(), self._pictures() + ledger.peak)


def optimizer_bytes(name: str, parameters: Iterable[nn.Parameter]) -> int:
    """States of an optimiser: mean and mean square of every weight, in float32 or in 8 bits, and a count of steps.

    8-bit states have a float32 scale for each 256 weights; tensors below 4096 weights stay in float32 (bitsandbytes).
    Paged states may lie in the host's memory, and are counted as if they did not.
    """
    sizes = [p.numel() for p in parameters]
    if name == "adamw":
        return sum(8 * size + 4 for size in sizes)
    return sum(8 * size if size < 4096 else 2 * (size + 4 * -(-size // 256)) + 2048 for size in sizes)
