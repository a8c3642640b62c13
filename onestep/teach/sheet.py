"""Files of an embedded teacher: its data set as one lossless picture with a JSON of what is on it, and clean configs."""

import json
import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def save_sheet(folder: Path, images: Tensor, labels: Tensor, tile: int) -> None:
    """Write images (N, 1, S, S) uint8, cropped at their centre to `tile`, as images.webp and labels.json in `folder`."""
    size = images.shape[-1]
    margin = (size - tile) // 2
    tiles = images[:, :, margin : margin + tile, margin : margin + tile]
    about = {"size": size, "tile": tile, "labels": "".join(str(int(label)) for label in labels)}
    _save(folder, tiles, "labels.json", about)


def save_captioned(folder: Path, images: Tensor, captions: list[str]) -> None:
    """Write images (N, 3, S, S) uint8 as images.webp and captions.json in `folder`."""
    size = images.shape[-1]
    _save(folder, images, "captions.json", {"size": size, "tile": size, "captions": captions})


def _save(folder: Path, tiles: Tensor, name: str, about: dict[str, Any]) -> None:
    """The tiles (N, C, T, T) side by side, row by row, in a square of them that is filled up with black."""
    folder.mkdir(parents=True, exist_ok=True)
    count, channels, tile, _ = tiles.shape
    side = math.ceil(math.sqrt(count))
    tiles = F.pad(tiles, (0, 0) * 3 + (0, side * side - count))
    sheet = tiles.view(side, side, channels, tile, tile).permute(0, 3, 1, 4, 2).reshape(side * tile, side * tile, channels)
    picture = Image.fromarray(sheet.expand(-1, -1, 3).contiguous().numpy())
    picture.save(folder / "images.webp", lossless=True, quality=100, method=6)
    (folder / name).write_text(json.dumps(about))


def forget_paths(folder: Path) -> None:
    """Remove the paths of this machine that diffusers writes into the configs of what it once loaded."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
