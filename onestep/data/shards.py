"""Rows of named tensors on disk: made once, resumed where their making was killed, checked when they are opened."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..files import fsync, replaced, save_tensors, sha256_of

INDEX = "index.json"
IN_MEMORY = 1 << 30
"""Bytes up to which all rows are held in memory."""

IN_USE: dict[str, str] = {}
"""Caches that this process has opened: SHA-256 of each one's index, which has the hashes of all its files, by its name."""

Rows = dict[str, Tensor]


class Shards:
    """Rows of named tensors in a folder of safetensors files, found again by the key that they were made from.

    `shards[index]` has the rows of `index`, a LongTensor (B,) in any order and with repeats, as tensors (B, ...) on the
    device of `to`, by default the CPU. `bytes` is their size on disk. Up to 1 GiB they are held in memory, beyond that
    they are read from memory-mapped files.
    """

    def __init__(self, folder: Path):
        """Open a complete folder. Raises ValueError naming whatever in it is missing or has changed."""
        self.folder, self.device = folder, torch.device("cpu")
        self.about, self._hashes = self._read(folder)
        for name, expected in self._hashes.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise _damaged(folder, f"{name} is missing or has changed since it was written")
        IN_USE[folder.name] = sha256_of(folder / INDEX)
        self.bytes = sum((folder / name).stat().st_size for name in self._hashes)
        self._files: dict[int, Rows] = {}
        self._held: Rows | None = None

    @staticmethod
    def folder_of(root: Path, name: str, key: dict[str, Any], count: int, rows_per_shard: int, dtype: Any = None) -> Path:
        """Where `build` with these arguments keeps its rows."""
        return root / f"{name}-{_digest(_about(key, count, rows_per_shard, dtype))}"

    @classmethod
    def build(
        cls,
        root: Path,
        name: str,
        key: dict[str, Any],
        count: int,
        make: Callable[[int, int], Rows],
        rows_per_shard: int = 1024,
        dtype: torch.dtype | None = None,
    ) -> "Shards":
        """The `count` rows that `key` stands for: found in `root`, or made by make(start, stop) a shard at a time.

        `key` is anything JSON can hold; rows made from another key, count or dtype have another folder. A killed build
        goes on after its last complete shard. Of several processes one builds and the others wait for it. `dtype` is
        that of floating-point tensors on disk; None keeps theirs. Raises ValueError for a folder that is damaged or
        cannot be written.
        """
        assert count > 0
        folder = cls.folder_of(root, name, key, count, rows_per_shard, dtype)
        if not (folder / INDEX).is_file():
            with locked(folder, ".lock"):
                if not (folder / INDEX).is_file():  # another process may have made it meanwhile
                    _fill(folder, _about(key, count, rows_per_shard, dtype), make, name, dtype)
        found = cls(folder)
        if found.about != _about(key, count, rows_per_shard, dtype):
            raise _damaged(folder, f"{INDEX} is that of other rows")
        return found

    @staticmethod
    def _read(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
        try:
            about = json.loads((folder / INDEX).read_text())
            hashes = about.pop("sha256")
            whole = folder.name.endswith(_digest(about)) and list(hashes) == _names(about)
        except (OSError, ValueError, AttributeError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise _damaged(folder, f"{INDEX} cannot be read") from error
        if not whole:
            raise _damaged(folder, f"{INDEX} has changed since it was written")
        return about, hashes

    def to(self, device: torch.device | str) -> "Shards":
        """Give rows on that device from now on; they are all held there where they take less than 1 GiB."""
        self.device, self._held = torch.device(device), None
        return self

    def __len__(self) -> int:
        return int(self.about["count"])

    def __getitem__(self, index: Tensor) -> Rows:
        if self.bytes <= IN_MEMORY:
            if self._held is None:
                self._held = {name: rows.to(self.device) for name, rows in self._gather(torch.arange(len(self))).items()}
                self._files.clear()
            return {name: rows[index.to(self.device)] for name, rows in self._held.items()}
        return {name: rows.to(self.device, non_blocking=True) for name, rows in self._gather(index.cpu()).items()}

    def _gather(self, index: Tensor) -> Rows:
        shard, row = index // self.about["rows_per_shard"], index % self.about["rows_per_shard"]
        first = self._file(0)
        rows = {name: each.new_empty(len(index), *each.shape[1:]) for name, each in first.items()}
        for number in shard.unique().tolist():
            here = shard == number
            for name, each in self._file(number).items():
                rows[name][here] = each[row[here]]
        return rows

    def _file(self, number: int) -> Rows:
        """A shard's tensors; they are views of the mapped file, of which only the rows that are used are read."""
        if number not in self._files:
            path = self.folder / _names(self.about)[number]
            try:
                with safe_open(path, "pt") as file:
                    self._files[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise _damaged(self.folder, f"{path.name} has vanished or changed since the run began") from error
        return self._files[number]


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Be the only process that writes in that folder, made where missing. Raises ValueError where it cannot be written.

    The lock is the file system's, not that of a group of processes: it has no timeout, holds among several runs, and
    ends with its process.
    """
    lock = FileLock(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); type --cache with a folder that can") from error
    try:
        yield
    finally:
        lock.release()


def _about(key: dict[str, Any], count: int, rows_per_shard: int, dtype: Any) -> dict[str, Any]:
    about = {"key": key, "count": count, "rows_per_shard": rows_per_shard, "dtype": str(dtype) if dtype else None}
    return json.loads(json.dumps(about))  # as it will be read again: tuples are lists


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _names(about: dict[str, Any]) -> list[str]:
    return [f"shard-{i:05d}.safetensors" for i in range(-(-about["count"] // about["rows_per_shard"]))]


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"the cache {folder} cannot be used: {what}. Delete that folder and start again: it is made anew")


def _fill(folder: Path, about: dict[str, Any], make: Callable[[int, int], Rows], name: str, dtype: Any) -> None:
    """Make what is missing; the hashes of the complete shards are in progress.json, which becomes the index."""
    progress, count, size = folder / "progress.json", about["count"], about["rows_per_shard"]
    before = _progress(progress)
    hashes: dict[str, str] = {}
    bar = tqdm(total=count, desc=f"caching {name}", unit="row", leave=False, disable=None)
    for start, file in zip(range(0, count, size), _names(about)):
        stop, path = min(start + size, count), folder / file
        if not path.is_file() or sha256_of(path) != before.get(file):
            _write(path, make(start, stop), stop - start, dtype)
            hashes[file] = sha256_of(path)
            write_json(progress, about | {"sha256": before | hashes})
            _room(folder, path.stat().st_size * (count - stop) // (stop - start))
        hashes[file] = hashes.get(file) or before[file]
        bar.update(stop - start)
    bar.close()
    write_json(progress, about | {"sha256": hashes})
    progress.replace(folder / INDEX)
    fsync(folder)


def _progress(path: Path) -> dict[str, str]:
    """Hashes of the shards that a killed build has left; none where it left nothing that can be read."""
    try:
        return dict(json.loads(path.read_text())["sha256"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _write(path: Path, rows: Rows, count: int, dtype: torch.dtype | None) -> None:
    assert all(len(each) == count for each in rows.values()), "make(start, stop) has stop - start rows"
    kept = {k: v.to("cpu", dtype if dtype and v.is_floating_point() else v.dtype).contiguous() for k, v in rows.items()}
    with replaced(path) as partial:
        save_tensors(kept, partial)


def _room(folder: Path, needed: int) -> None:
    """Say at the first shard, not at the last one, that the disk is too small."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the cache {folder} needs {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB free; "
            "type --cache with a folder on a larger one, or use fewer rows"
        )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is whole or absent."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(content))
        fsync(partial)
