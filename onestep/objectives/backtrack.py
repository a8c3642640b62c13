"""Distribution backtracking (DisBack, Zhang et al. 2024, arXiv 2408.15991): a schedule of teachers for any score loss.

The critic is first trained on samples of the frozen initial generator, from the teacher on, and recorded on its way: these
nodes lead from the teacher's distribution to the generator's. Then the generator follows them in reverse, and ends at the
teacher itself. As the recorded network is the critic, the critic starts the second stage as the last node.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..denoiser import Denoiser, unwrap
from ..files import fsync
from ..fsdp import FSDPModule
from ..teacher import Teacher


class Backtrack:
    """The target of each step, a function of the step alone; nodes are files in the run's folder.

    Node i of n is the critic after i/n of the `record` steps, node 0 the teacher, node n only the critic's start. Of the
    steps after them, each `steps` have one of the nodes n-1, ..., 1 as their target, and all later ones the teacher.
    """

    def __init__(self, run: Path, teacher: Teacher, record: int, nodes: int, steps: int):
        assert not record or nodes <= record
        self.folder, self.record, self.nodes, self.steps = run / "backtrack", record, nodes, steps
        self.settled = record + (nodes - 1) * steps if record else 0
        self._copy = teacher.copy().requires_grad_(False) if record and nodes > 1 else None
        self._loaded = 0

    @property
    def node(self) -> Denoiser | None:
        """The recorded teacher in force; None is the teacher itself."""
        return self._copy if self._loaded else None

    def kept(self) -> list[nn.Module]:
        return [] if self._copy is None else [self._copy]

    def recording(self, step: int) -> bool:
        """Whether this step only trains the critic."""
        return step < self.record

    def index(self, step: int) -> int:
        """The node in force at a step; 0 is the teacher."""
        if not self.record or self.recording(step):
            return 0
        return max(0, self.nodes - 1 - (step - self.record) // self.steps)

    def visit(self, step: int, critic: Denoiser) -> None:
        """Record the critic where a node lies before this step, and take up the step's target.

        Raises ValueError where a node's file is missing or does not fit.
        """
        for i in range(1, self.nodes):
            if self.record and step == i * self.record // self.nodes:
                self._save(i, critic)
        index = self.index(step)
        if index != self._loaded:
            if index:
                self._load(index)
            self._loaded = index

    def path(self, index: int) -> Path:
        return self.folder / f"node-{index:03d}.safetensors"

    def _save(self, index: int, critic: Denoiser) -> None:
        if isinstance(critic.network, FSDPModule):
            raise ValueError("--backtrack records whole networks: leave it out, or launch with DDP")
        path = self.path(index)
        if path.exists():  # by another process, by this step's first micro-batch, or before a resume: the same weights
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {k: v.detach().contiguous() for k, v in unwrap(critic.network).state_dict().items()}
        save_file(tensors, scratch, {"sha256": _digest(tensors)})
        fsync(scratch)
        scratch.replace(path)
        fsync(path.parent)  # a checkpoint of a later step must not outlive it

    def _load(self, index: int) -> None:
        assert self._copy is not None
        try:
            self._copy.network.load_state_dict(_read(self.path(index)), strict=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the recorded teacher {self.path(index)} cannot be used: {reason}. Start over with --restart"
            ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """A node's tensors. Raises OSError, SafetensorError or RuntimeError where they are not those that were written."""
    with safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get("sha256")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if _digest(tensors) != written:
        raise RuntimeError("it has changed since it was written")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
