"""Pictures as a teacher wants them, and the data sets in the package."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ..teacher import ASSETS
from .rows import Row, Source

EMBEDDED = ("fashion", "digits")
"""Data sets in the package: 10,000 Fashion-MNIST training images (32x32), scikit-learn's 1,797 digits (8x8)."""


def fitted(image: Image.Image, channels: int, size: int) -> Tensor:
    """(channels, size, size) float32 in [-1, 1]: resized (antialiased bicubic) and centre-cropped."""
    pixels = v2.functional.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    pixels = v2.functional.resize(pixels, [size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    pixels = v2.functional.center_crop(pixels, [size])
    return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), [0.5], [0.5])


def load_embedded(name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, size, size) float32 in [-1, 1] and labels (N,) of a data set in the package.

    It is kept as one picture of side-by-side tiles, row by row, and a JSON file of its labels and tile size.
    """
    tiles, labels, size = _tiles(name)
    return _padded(tiles, size).float() / 127.5 - 1, labels


def _tiles(name: str) -> tuple[Tensor, Tensor, int]:
    folder = ASSETS / f"{name}_data"
    about = json.loads((folder / "labels.json").read_text())
    labels, tile, size = torch.tensor([int(c) for c in about["labels"]]), about["tile"], about["size"]
    sheet = v2.functional.pil_to_tensor(Image.open(folder / "images.webp").convert("L"))[0]
    rows, columns = sheet.shape[0] // tile, sheet.shape[1] // tile
    tiles = sheet.view(rows, tile, columns, tile).transpose(1, 2).reshape(-1, 1, tile, tile)[: len(labels)]
    return tiles, labels, size


def _padded(tiles: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(tiles, ((size - tiles.shape[-1]) // 2,) * 4)


@dataclass(frozen=True)
class Tile:
    """One picture of an embedded data set, uint8 (1, size, size)."""

    pixels: Tensor

    def read(self) -> bytes:
        file = io.BytesIO()
        v2.functional.to_pil_image(self.pixels).save(file, "png")
        return file.getvalue()


class Embedded(Source):
    """A data set in the package."""

    kind = "embedded data"

    def _rows(self) -> Iterable[Row]:
        tiles, labels, size = _tiles(self.name)
        for index, (pixels, label) in enumerate(zip(_padded(tiles, size), labels.tolist())):
            yield Row(f"picture {index}", Tile(pixels), None, label)
