"""FID in Inception-v3 features through clean-fid (Parmar et al. 2022): its resizer and its call of the network."""

import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import sha256_of
from ..weights import find_file
from .frechet import Moments, frechet_distance
from .images import pixels_of

MODES = ("clean", "legacy_tensorflow")
"""clean-fid's modes with this network; its legacy_pytorch uses other weights."""
FILE = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of the file at URL, as k-diffusion's k_diffusion/evaluation.py checks it too."""
DIMENSIONS = 2048


def find_weights(weights: str | Path | None = None) -> Path:
    """The network's file: `weights`, or the copy in torch.hub's cache, downloaded there and verified where missing.

    Raises ValueError where it cannot be had.
    """
    return find_file("FID needs Inception-v3 and it", URL, FILE, weights, SHA256)


def load_inception(path: Path, mode: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """clean-fid's network: float images (B, 3, H, W) in [0, 255] to features (B, 2048).

    Raises ValueError for a file that is no TorchScript of it.
    """
    from cleanfid.inception_torchscript import InceptionV3W

    with tempfile.TemporaryDirectory() as folder:
        # clean-fid takes a folder and insists on the file's name in it
        shutil.copyfile(path, Path(folder) / FILE)
        try:
            return InceptionV3W(folder, download=False, resize_inside=mode == "legacy_tensorflow").eval().to(device)
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} is not the Inception-v3 of clean-fid ({reason}); download {URL} again") from error


@torch.no_grad()
def inception_moments(
    images: str | Path | Iterable[Tensor],
    network: Callable[[Tensor], Tensor],
    mode: str,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Moments:
    """Moments of the Inception features of a folder's images, or of batches (B, C, H, W) in [0, 1]."""
    from cleanfid.resize import build_resizer

    resize, moments = build_resizer(mode), Moments(DIMENSIONS)
    waiting: list[Tensor] = []

    def flush() -> None:
        if len({resized.shape for resized in waiting}) > 1:
            raise ValueError(f"images of several sizes cannot be scored in mode {mode}: type --mode clean")
        moments.update(network(torch.stack(waiting).to(device)))
        waiting.clear()

    for image in pixels_of(images):
        waiting.append(torch.from_numpy(np.asarray(resize(image), dtype=np.float32)).permute(2, 0, 1))
        if len(waiting) == batch_size:
            flush()
    if waiting:
        flush()
    return moments


def load_statistics(path: str | Path) -> Moments:
    """mu (2048,) and sigma (2048, 2048) of an npz as clean-fid and others publish it.

    Such files do not tell how many images they come from: the count of the result means nothing.
    Raises ValueError for other files.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, sigma = torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a statistics file ({error}): expected is an npz with mu and sigma") from error
    if mu.shape != (DIMENSIONS,):
        raise ValueError(f"{path} has mu of shape {tuple(mu.shape)}; expected is ({DIMENSIONS},)")
    return Moments.of(2, mu, sigma, str(path))


def fid(
    images: str | Path | Iterable[Tensor],
    reference: str | Path,
    weights: str | Path | None = None,
    mode: str = "clean",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """FID of a folder of images, or of batches (B, C, H, W) in [0, 1], against a folder of images or an npz.

    The row's key is FID only with clean-fid's own network; with other --weights it is FD. Network and reference are
    ready before the first image is asked for. Raises ValueError for what is missing, damaged or does not fit.
    """
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r}; allowed are {', '.join(MODES)}: type --mode clean")
    if not Path(reference).exists():
        raise ValueError(f"no reference {reference}; name a folder of images or an npz with mu and sigma")
    path = find_weights(weights)
    network, digest, folder = load_inception(path, mode, device), sha256_of(path), Path(reference).is_dir()
    real = inception_moments(reference, network, mode, batch_size, device) if folder else load_statistics(reference)
    fake = inception_moments(images, network, mode, batch_size, device)
    if fake.count <= DIMENSIONS:
        warnings.warn(f"FID from {fake.count} images is biased upwards; published ones take 50,000 or so", stacklevel=2)
    return {
        "FID" if digest == SHA256 else "FD": frechet_distance(fake, real),
        "mode": mode,
        "count": fake.count,
        "extractor_sha256": digest,
        "reference": str(reference),
        "reference_count": real.count if folder else None,
        "reference_sha256": None if folder else sha256_of(reference),
    }
