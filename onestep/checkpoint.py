"""Checkpoints: safetensors and JSON in a folder that appears under its name only when it is complete.

`step-00000123` holds one file of tensors for each network and each optimiser, and state.json: the step, the caches that
were in use, and the size and SHA-256 of every file. No random generator is saved: every draw, the order of the data and
the learning rate are functions of seed and step.
"""

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import fsync, save_tensors
from .manifest import Damaged, explained, read_state, verify, write_state

NAME = re.compile(r"step-\d{8,}")


def save_checkpoint(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Any],
    keep: int,
    caches: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/step-00000123`; only then are checkpoints beyond the newest `keep` deleted, and those of later steps.

    Those of later steps were found damaged when the run was resumed. `caches` are versions of caches by their names.
    Raises OSError, and leaves nothing half-written behind, where the disk is full or the folder cannot be written.
    """
    final = folder / f"step-{step:08d}"
    scratch = _scratch(final)
    try:
        for abandoned in folder.glob(_scratch(folder / "*").name):  # of a run that was killed while it wrote or deleted
            shutil.rmtree(abandoned)
        scratch.mkdir(parents=True)
        _write(scratch, step, modules, optimizers, caches or {})
        if final.exists():  # damaged, or the same
            shutil.rmtree(final.rename(_scratch(final.with_name(f"{final.name}.old"))))
        scratch.rename(final)
        fsync(folder)
        fsync(folder.parent)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(
            f"the checkpoint {final} could not be written ({error.strerror or error}); those before it are whole: make room "
            "on the disk, or make the folder writable, and type the same command again to go on from the last one"
        ) from error
    found = _found(folder)
    place = found.index(final) + 1
    for old in found[: max(0, place - keep)] + found[place:]:
        shutil.rmtree(old.rename(_scratch(old)))  # renamed first: what bears the name of a checkpoint is whole
    return final


def _write(
    scratch: Path, step: int, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Any], caches: Mapping[str, str]
) -> None:
    groups: dict[str, Any] = {}
    for name, module in modules.items():
        save_tensors(module.state_dict(), scratch / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        tensors, groups[name] = _flatten(optimizer.state_dict())
        save_tensors(tensors, scratch / f"optimizer-{name}.safetensors")
    write_state(scratch, step, groups, caches)
    fsync(scratch)


def latest_checkpoint(folder: Path, module: str | None = None, aloud: bool = True) -> Path | None:
    """The newest checkpoint in `folder` every file of which is whole, or at least that of `module`; None without any.

    Newer ones that are damaged are named on stderr, unless not `aloud`. Raises ValueError where all are damaged.
    """
    damaged: list[Damaged] = []
    for path in reversed(_found(folder)):
        try:
            with explained(path):
                verify(path, read_state(path), module and f"{module}.safetensors")
        except Damaged as error:
            damaged.append(error)
            continue
        for each in damaged if aloud else ():
            print(f"warning: {each.path} is damaged and passed over: {each.reason}; {path} is whole", file=sys.stderr)
        return path
    if damaged:
        raise damaged[0]
    return None


def load_checkpoint(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Any]) -> int:
    """Load every tensor strictly; returns the number of steps done. Raises ValueError naming what is broken."""
    with explained(path):
        state = read_state(path)
        verify(path, state)
        for name, module in modules.items():
            module.load_state_dict(load_file(path / f"{name}.safetensors"), strict=True)
        for name, optimizer in optimizers.items():
            tensors = load_file(path / f"optimizer-{name}.safetensors")
            optimizer.load_state_dict(_unflatten(tensors, state["groups"][name]))
        return int(state["step"])


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """One module's tensors from a checkpoint. Raises ValueError where they are missing or broken."""
    with explained(path):
        verify(path, read_state(path), f"{name}.safetensors")
        return load_file(path / f"{name}.safetensors")


def tell_changed_caches(path: Path, caches: Mapping[str, str]) -> None:
    """Name on stderr the caches in use, versions by names, that were others when the checkpoint was written."""
    with explained(path):
        before = read_state(path).get("caches", {})
        changed = [name for name, version in caches.items() if before.get(name, version) != version]
    for name in changed:
        print(
            f"warning: the cache {name} was made again since {path.name}: the run may end with other bits", file=sys.stderr
        )


def _found(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, the oldest first."""
    found = (path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _scratch(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimiser's state as tensors by "<parameter>.<slot>" and its JSON-able parameter groups."""
    tensors = {f"{i}.{slot}": torch.as_tensor(v) for i, slots in state["state"].items() for slot, v in slots.items()}
    return tensors, state["param_groups"]


def _unflatten(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, slot = key.split(".", 1)
        state.setdefault(int(index), {})[slot] = value
    return {"state": state, "param_groups": groups}
