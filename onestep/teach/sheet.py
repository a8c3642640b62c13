"""A small data set as one lossless picture and a JSON file of labels: what `onestep.data` reads back."""

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
