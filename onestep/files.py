"""Files on disk: what they hash to, and getting them there for good."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file. Raises ValueError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a file that exists") from error
    return digest.hexdigest()


def fsync(path: str | Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write: at the end it takes its place in one move, and after an error it is gone.

    Its name ends in .partial, whatever that of `path` ends in.
    """
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on the disk. Raises OSError where it cannot be written.

    The library's own error for a full disk is none of Python's, and may leave half a file: here it is an OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
        fsync(path)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {' '.join(str(error).split())}") from error


def differences_from(path: Path, settings: Mapping[str, Any]) -> str:
    """Where the settings in a JSON file are others than these, as in "steps: 4 and 8; seed: 0 and 1", or nothing.

    Entries that the file alone has are not looked at. Raises ValueError for a file that is no JSON.
    """
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    return "; ".join(f"{name}: {before.get(name)} and {now[name]}" for name in now if before.get(name) != now[name])
