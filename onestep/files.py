"""Files on disk: what they hash to, and getting them there for good."""

import hashlib
import os
from pathlib import Path


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
