"""Reference statistics are built once from a folder of real images, and kept with all that they depend on."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import differences_from, replaced, sha256_of
from .extractor import Extractor, Features
from .images import Survey, files_of
from .measure import Collector, Measured, seen

NAME, POOLED, SPATIAL, FEATURES = "reference.json", "pooled.safetensors", "spatial.safetensors", "features.safetensors"
PART = 1024
"""Images whose features are written at once while a reference is built: what a kill costs at most."""


def sha256_of_files(folder: str | Path, files: Sequence[Path]) -> str:
    """Hex digest over the relative paths and contents of files, in their order."""
    lines = (f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def build(
    folder: str | Path,
    target: str | Path,
    extractor: Extractor,
    *,
    size: int | None = None,
    keep_features: bool = False,
    spatial: bool = False,
    batch_size: int = 64,
    workers: int = 1,
) -> dict[str, Any]:
    """Write the statistics of a folder's images to the new folder `target`; returns what its reference.json says.

    Features are gathered in `target`.part, `PART` images a file: the same call goes on where it was stopped, and gives
    the bits that it would have given. Raises ValueError for images that cannot be read, for a `target` that is there,
    and for a `target`.part of other images or settings.
    """
    target, files = Path(target), files_of(folder)
    if target.exists():
        raise ValueError(f"{target} is there already; name another with -o, or remove it")
    if not target.parent.is_dir():
        raise ValueError(f"no folder {target.parent} for -o {target}: make it first")
    settings = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "size": size,
        "spatial": spatial,
        "count": len(files),
        "files_sha256": sha256_of_files(folder, files),
    }
    unfinished = target.with_name(target.name + ".part")
    _begin(unfinished, settings)
    metrics = ("sfid",) if spatial else ()
    survey = Survey()
    collector = Collector(extractor, (*metrics, *(("kid",) if keep_features else ())))

    def pictures(part: range) -> list[Callable[[], np.ndarray]]:
        return [partial(survey.read, files[i]) for i in part]

    for start in range(0, len(files), PART):
        part = range(start, min(start + PART, len(files)))
        path = unfinished / f"{start:09d}.safetensors"
        if not path.is_file():
            batches = seen(part, pictures, extractor, batch_size, size, workers)
            _write_part(path, [features for _, features in batches])
        collector.add(_read_part(path))
    details = settings | _kinds(files) | {"folder": Path(folder).as_posix(), "features": keep_features}
    survey.warn(folder, one_size=size is not None)
    _finish(unfinished, target, collector.measured(), details)
    return details


def _begin(unfinished: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a build, or find that of the same build that was stopped."""
    path = unfinished / "settings.json"
    if path.is_file():
        if shown := differences_from(path, settings):
            raise ValueError(f"{unfinished} is of another build ({shown}): remove it, or name another -o")
        return
    if unfinished.is_dir() and any(unfinished.iterdir()):
        raise ValueError(f"{unfinished} is there and is no build that was stopped: remove it, or name another -o")
    unfinished.mkdir(exist_ok=True)
    with replaced(path) as draft:
        draft.write_text(json.dumps(settings), encoding="utf-8")


def _write_part(path: Path, batches: list[Features]) -> None:
    tensors = {"pooled": torch.cat([each.pooled for each in batches])}
    if all(each.spatial is not None for each in batches):
        tensors["spatial"] = torch.cat([each.spatial for each in batches if each.spatial is not None])
    with replaced(path) as draft:
        save_file(tensors, draft)


def _read_part(path: Path) -> Features:
    tensors = tensors_of(path)
    return Features(pooled=tensors["pooled"], spatial=tensors.get("spatial"))


def _kinds(files: Sequence[Path]) -> dict[str, Any]:
    """Formats by the files' own headers: those of a resumed build are not read twice for their pixels."""
    kinds = set()
    for file in files:
        with Image.open(file) as image:
            kinds.add(image.format or "?")
    return {"formats": sorted(kinds)}


def _finish(unfinished: Path, target: Path, measured: Measured, details: dict[str, Any]) -> None:
    whole = target.with_name(target.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    measured.moments.save(whole / POOLED)
    if measured.spatial is not None:
        measured.spatial.save(whole / SPATIAL)
    if measured.pooled is not None:
        save_file({"pooled": measured.pooled}, whole / FEATURES)
    (whole / NAME).write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, target)
    shutil.rmtree(unfinished)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises ValueError where it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not readable ({error}): remove it, and build the reference again") from error
