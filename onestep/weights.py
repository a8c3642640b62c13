"""Weights files of extractors and scorers: found on disk, downloaded where they are not, and read without pickle."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import sha256_of


def cache() -> Path:
    """Where weights are kept: torch.hub's folder of checkpoints, ~/.cache/torch/hub/checkpoints; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_file(what: str, url: str, name: str, weights: str | Path | None = None, sha256: str | None = None) -> Path:
    """`weights`, or the file `name` in the cache, downloaded there from `url` where it is missing.

    what: the network that needs it, for messages. A file in the cache whose hash does not begin with `sha256` is
    downloaded again.
    Raises ValueError, with the address and the place, where the file cannot be had.
    """
    path = Path(weights) if weights else cache() / name
    if path.is_file() and (weights or sha256 is None or sha256_of(path).startswith(sha256)):
        return path
    if weights:
        raise ValueError(f"no file {path}; download {url} and type --weights with its path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong hash a RuntimeError
        raise ValueError(
            f"{what} could not be downloaded ({error}): fetch {url} elsewhere, put it at {path} or type --weights "
            "with its path"
        ) from error
    return path


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .pth, .pt or .bin that holds nothing but tensors.

    A state under the key "state_dict", as training scripts save it, is taken out, and a "module." before names dropped.
    Raises ValueError for a file that is missing or damaged, or that would need pickle to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; name a file of weights that exists")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} is no safetensors file and no file of plain tensors ({reason}); fetch it again, or save its state_dict "
            "with safetensors.torch.save_file"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not (isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(f"{path} holds more than tensors by name; save the model's state_dict with safetensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: str | Path, what: str) -> None:
    """Load every tensor into its place. Raises ValueError, naming the first of them, where names or shapes differ."""
    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{path} does not hold the weights of {what}: {lines[0][:200]}; name another file") from error
