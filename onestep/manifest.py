"""state.json of a checkpoint: what it says of the files beside it, and whether they are still what it says."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .files import fsync, sha256_of

STATE = "state.json"
KEYS = {"step", "groups", "sha256"}
BROKEN = (OSError, LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError, SafetensorError)
"""What reading a damaged file raises."""
LATER_KEYS = {"bytes", "caches"}
"""What state.json of older checkpoints lacks."""


class Damaged(ValueError):
    """A checkpoint that cannot be used; `reason` is what is wrong with it, the message also says what to do."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"the checkpoint {path} cannot be used: {reason}. Delete that folder to go on from the one before it, or start "
            "over with --restart"
        )
        self.path, self.reason = path, reason


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever a damaged checkpoint raises, as Damaged."""
    try:
        yield
    except BROKEN as error:
        reason = f"{error} is missing in it" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise Damaged(path, reason) from error


def write_state(folder: Path, step: int, groups: dict[str, Any], caches: Mapping[str, str]) -> None:
    """Describe the files in `folder`, and wait until the description is on the disk."""
    files = sorted(folder.iterdir())
    state = {
        "step": step,
        "groups": groups,
        "sha256": {path.name: sha256_of(path) for path in files},
        "bytes": {path.name: path.stat().st_size for path in files},
        "caches": dict(caches),
    }
    (folder / STATE).write_text(json.dumps(state | {"check": _check(state)}, indent=1))
    fsync(folder / STATE)


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote. Raises one of the errors that `explained` knows where it is something else."""
    state = json.loads((folder / STATE).read_text())
    check = state.pop("check", None)
    if not KEYS <= set(state) <= KEYS | LATER_KEYS or check != _check(state):
        raise ValueError(f"{STATE} has changed since it was written")
    if state["step"] != int(folder.name.removeprefix("step-")):
        raise ValueError(f"{STATE} is that of step {state['step']}")
    return state


def _check(state: dict[str, Any]) -> str:
    """A hash of state.json's content; written again it must be the same: JSON keeps every float exactly."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def verify(folder: Path, state: dict[str, Any], file: str | None = None) -> None:
    """Every file, or that one, is as it was written. Raises one of the errors that `explained` knows where it is not."""
    names = [file] if file else list(state["sha256"])
    for name in names:  # first: sizes are had for nothing
        if Path(name).name != name:
            raise ValueError(f"{STATE} names a file outside of the checkpoint, {name!r}")
        size = (folder / name).stat().st_size
        if size != state.get("bytes", {}).get(name, size):
            raise ValueError(f"{name} has {size:,} bytes of {state['bytes'][name]:,}")
    for name in names:
        if sha256_of(folder / name) != state["sha256"][name]:
            raise ValueError(f"{name} has changed since it was written")
