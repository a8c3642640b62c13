"""Checkpoints: safetensors and JSON in a folder that appears under its name only when it is complete."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import fsync, sha256_of


def save_checkpoint(
    folder: Path, step: int, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder/step-00000123`; older checkpoints beyond the newest `keep` are deleted only afterwards."""
    final = folder / f"step-{step:08d}"
    scratch = _scratch(final)
    for abandoned in folder.glob(_scratch(folder / "*").name):  # of a run that was killed while it wrote or deleted
        shutil.rmtree(abandoned)
    scratch.mkdir(parents=True)
    groups: dict[str, Any] = {}
    for name, module in modules.items():
        save_file({k: v.detach().contiguous() for k, v in module.state_dict().items()}, scratch / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        tensors, groups[name] = _flatten(optimizer.state_dict())
        save_file(tensors, scratch / f"optimizer-{name}.safetensors")
    hashes = {path.name: sha256_of(path) for path in sorted(scratch.iterdir())}
    state = {"step": step, "groups": groups, "sha256": hashes}
    (scratch / "state.json").write_text(json.dumps(state | {"check": _check(state)}, indent=1))
    for path in scratch.iterdir():
        fsync(path)
    fsync(scratch)
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    fsync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old.rename(_scratch(old)))  # renamed first: what bears the name of a checkpoint is whole
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def load_checkpoint(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Any]) -> int:
    """Load every tensor strictly; returns the number of steps done. Raises ValueError naming what is broken."""
    with _explained(path):
        state = _state(path)
        for name in state["sha256"]:
            _verify(path, state, name)
        for name, module in modules.items():
            module.load_state_dict(load_file(path / f"{name}.safetensors"), strict=True)
        for name, optimizer in optimizers.items():
            tensors = load_file(path / f"optimizer-{name}.safetensors")
            optimizer.load_state_dict(_unflatten(tensors, state["groups"][name]))
        return int(state["step"])


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """One module's tensors from a checkpoint. Raises ValueError where they are missing or broken."""
    with _explained(path):
        _verify(path, _state(path), f"{name}.safetensors")
        return load_file(path / f"{name}.safetensors")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever a damaged checkpoint raises, as a ValueError that says what to do."""
    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{error} is missing in it" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"the checkpoint {path} cannot be used: {reason}. Delete that folder to go on from the one before it, "
            "or start over with --restart"
        ) from error


def _state(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text())
    check = state.pop("check", None)
    if set(state) != {"step", "groups", "sha256"} or check not in (None, _check(state)):
        raise ValueError("state.json has changed since it was written")
    return state


def _check(state: dict[str, Any]) -> str:
    """A hash of state.json's content; written again it must be the same: JSON keeps every float exactly."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _verify(path: Path, state: dict[str, Any], name: str) -> None:
    if sha256_of(path / name) != state["sha256"][name]:
        raise ValueError(f"{name} has changed since it was written")


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
