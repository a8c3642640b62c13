"""Files of an embedded teacher: its data set as one lossless picture with a JSON of labels, and clean configs."""

import json
import math
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def save_sheet(folder: Path, images: Tensor, labels: Tensor, tile: int) -> None:
    """Write images (N, 1, S, S) uint8, cropped at their centre to `tile`, as images.webp and labels.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    size = images.shape[-1]
    margin = (size - tile) // 2
    tiles = images[:, 0, margin : margin + tile, margin : margin + tile]
    side = math.ceil(math.sqrt(len(tiles)))
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, side * side - len(tiles)))
    sheet = tiles.view(side, side, tile, tile).transpose(1, 2).reshape(side * tile, side * tile)
    Image.fromarray(sheet.numpy()).convert("RGB").save(folder / "images.webp", lossless=True, quality=100, method=6)
    about = {"size": size, "tile": tile, "labels": "".join(str(int(label)) for label in labels)}
    (folder / "labels.json").write_text(json.dumps(about))


def forget_paths(folder: Path) -> None:
    """Remove the paths of this machine that diffusers writes into the configs of what it once loaded."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
