"""Reference statistics as they are read: what `build_reference` wrote, an npz of others, or a folder measured now."""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import sha256_of
from .build_reference import FEATURES, NAME, POOLED, SPATIAL, sha256_of_files, tensors_of
from .extractor import Extractor
from .frechet import Moments
from .images import Survey, files_of
from .measure import METRICS, Measured, Pictures, measure


@dataclass(frozen=True)
class Reference:
    """What was measured of the real images, and what a row says of them."""

    measured: Measured
    details: dict[str, Any]
    formats: tuple[str, ...] | None
    """Of the real images' files; None where nobody knows."""


def load(
    path: str | Path,
    extractor: Extractor,
    metrics: Sequence[str],
    *,
    size: int | None = None,
    batch_size: int = 64,
    workers: int = 1,
) -> Reference:
    """What `build_reference.build` wrote, an npz as clean-fid, EDM and ADM publish it, or a folder of images, measured now.

    Raises ValueError for what is missing or damaged, and for statistics of another extractor or size.
    """
    path = Path(path)
    if (path / NAME).is_file():
        return _built(path, extractor, size)
    if path.is_dir():
        return measured_folder(path, extractor, metrics, size=size, batch_size=batch_size, workers=workers)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, extractor, metrics, size, batch_size)
    raise ValueError(f"no reference {path}; name a folder that eval/reference.py wrote, a folder of images, or an npz")


def measured_folder(
    folder: str | Path,
    extractor: Extractor,
    metrics: Sequence[str],
    *,
    size: int | None,
    batch_size: int,
    workers: int,
    reference_formats: Sequence[str] | None = None,
    count: int | None = None,
    seen_by: Callable[[Pictures], Pictures] | None = None,
) -> Reference:
    """A folder of images, or its first `count`; warns as `Survey.warn` does, against `reference_formats`.

    `seen_by` takes the place of the pictures' reader, and hands on what it reads.
    """
    files = files_of(folder)
    if count is not None and not 2 <= count <= len(files):
        raise ValueError(f"--count {count} is not allowed; {folder} holds {len(files)} images: type 2 to {len(files)}")
    files, survey = files[:count], Survey()

    def pictures(part: range) -> list[Callable[[], np.ndarray]]:
        return [partial(survey.read, files[i]) for i in part]

    shown = pictures if seen_by is None else seen_by(pictures)
    measured = measure(len(files), shown, extractor, metrics, batch_size, size, workers)
    survey.gather()
    survey.warn(folder, reference_formats, one_size=size is not None)
    details = {"folder": Path(folder).as_posix(), "files_sha256": sha256_of_files(folder, files), **survey.details()}
    return Reference(measured, details | {"count": len(files)}, tuple(survey.formats))


def _built(folder: Path, extractor: Extractor, size: int | None) -> Reference:
    try:
        details = json.loads((folder / NAME).read_text(encoding="utf-8"))
        stated = [details[name] for name in ("extractor", "extractor_sha256", "size")]
        spatial, features, formats = details["spatial"], details["features"], tuple(details["formats"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / NAME} is damaged ({error!r}): build the reference again") from error
    asked = [extractor.name, extractor.sha256, size]
    for name, there, here in zip(("extractor", "extractor's weights", "size"), stated, asked):
        if there != here:
            raise ValueError(
                f"{folder} was built with another {name}: {there}, and not {here}; build it again with this one"
            )
    measured = Measured(Moments.load(folder / POOLED))
    if spatial:
        measured = replace(measured, spatial=Moments.load(folder / SPATIAL))
    if features:
        measured = replace(measured, pooled=tensors_of(folder / FEATURES)["pooled"])
    return Reference(measured, {**details, "sha256": sha256_of(folder / POOLED)}, formats)


def _npz(path: Path, extractor: Extractor, metrics: Sequence[str], size: int | None, batch_size: int) -> Reference:
    """mu, sigma, and as ADM's have them mu_s, sigma_s of spatial features and images arr_0, uint8 (N, H, W, 3)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            moments = _moments(arrays, "mu", "sigma", path)
            spatial = _moments(arrays, "mu_s", "sigma_s", path) if "mu_s" in arrays else None
            wanted = any(METRICS[name].pooled for name in metrics) and "arr_0" in arrays
            images = arrays["arr_0"] if wanted else None
    except (OSError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a statistics file ({error}): expected is an npz with mu and sigma") from error
    if moments.dimensions != extractor.dimensions:
        raise ValueError(
            f"{path} has {moments.dimensions} dimensions, and {extractor.name} {extractor.dimensions}: type --extractor "
            "with the one that it was made with"
        )
    measured = Measured(moments, spatial=spatial)
    if images is not None:
        shown = [partial(np.asarray, image) for image in images]
        pooled = measure(len(shown), lambda part: [shown[i] for i in part], extractor, ("kid",), batch_size, size).pooled
        measured = replace(measured, pooled=pooled)
    return Reference(measured, {"sha256": sha256_of(path)}, None)


def _moments(arrays: Any, mean: str, covariance: str, path: Path) -> Moments:
    # such files do not tell how many images they come from: the count means nothing
    return Moments.of(2, torch.from_numpy(arrays[mean]), torch.from_numpy(arrays[covariance]), str(path))
