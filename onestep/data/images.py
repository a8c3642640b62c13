"""Pictures as a teacher wants them, and the data sets in the package."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ..teacher import ASSETS
from .rows import Row, Source, label_of

LABELLED = ("fashion", "digits")
"""Data sets in the package with classes: 10,000 Fashion-MNIST training images (32x32), scikit-learn's 1,797 digits (8x8)."""
EMBEDDED = (*LABELLED, "emoji")
"""All data sets in the package; `emoji` are 1,914 pictures of Twemoji (32x32, colour) with their names as captions."""


def fitted(image: Image.Image, channels: int, size: int) -> Tensor:
    """(channels, size, size) float32 in [-1, 1]: resized (antialiased bicubic) and centre-cropped."""
    pixels = v2.functional.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    pixels = v2.functional.resize(pixels, [size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    pixels = v2.functional.center_crop(pixels, [size])
    return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), [0.5], [0.5])


def load_embedded(name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, size, size) float32 in [-1, 1] and labels (N,) of a data set in the package that has classes.

    It is kept as one picture of side-by-side tiles, row by row, and a JSON file of its labels and tile size.
    Raises ValueError for one that has captions instead.
    """
    if name not in LABELLED:
        raise ValueError(f"{name} has captions and no labels; data in the package with labels are {', '.join(LABELLED)}")
    tiles, about = _tiles(name)
    return _padded(tiles, about["size"]).float() / 127.5 - 1, torch.tensor([int(label) for label in about["labels"]])


def _tiles(name: str) -> tuple[Tensor, dict[str, Any]]:
    """Tiles (N, C, T, T) uint8, and what is said of them: the pictures' "size", and "labels" or "captions" by tile."""
    sheet, words = files_of(name)
    about = json.loads(words.read_text())
    count, tile = len(about.get("labels") or about["captions"]), about["tile"]
    pixels = v2.functional.pil_to_tensor(Image.open(sheet).convert("L" if name in LABELLED else "RGB"))
    channels, rows, columns = pixels.shape[0], pixels.shape[1] // tile, pixels.shape[2] // tile
    tiles = pixels.view(channels, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).reshape(-1, channels, tile, tile)
    return tiles[:count], about


def files_of(name: str) -> tuple[Path, Path]:
    """The picture of tiles and the JSON file of a data set in the package."""
    folder = ASSETS / f"{name}_data"
    return folder / "images.webp", folder / ("labels.json" if name in LABELLED else "captions.json")


def _padded(tiles: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(tiles, ((size - tiles.shape[-1]) // 2,) * 4)


@dataclass(frozen=True)
class Tile:
    """One picture of an embedded data set, uint8 (1 or 3, size, size)."""

    pixels: Tensor

    def read(self) -> bytes:
        file = io.BytesIO()
        v2.functional.to_pil_image(self.pixels).save(file, "png")
        return file.getvalue()


class Embedded(Source):
    """A data set in the package."""

    kind = "embedded data"

    def __init__(self, name: str):
        super().__init__(name, files_of(name))

    def _rows(self) -> Iterable[Row]:
        tiles, about = _tiles(self.name)
        nothing = [None] * len(tiles)
        labels, captions = about.get("labels", nothing), about.get("captions", nothing)
        for index, (pixels, label, caption) in enumerate(zip(_padded(tiles, about["size"]), labels, captions)):
            yield Row(f"picture {index}", Tile(pixels), caption, label_of(label))
