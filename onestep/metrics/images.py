"""Images on their way to an extractor: 8-bit pixels, as a saved PNG holds them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def quantise(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8 as diffusers' numpy_to_pil does, so that scores are those of the saved PNGs."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def pixels_of(images: str | Path | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Single images as uint8 (H, W, 3), from a folder (sorted, nested) or from batches (B, 1 or 3, H, W) in [0, 1]."""
    if isinstance(images, (str, Path)):
        files = sorted(file for file in Path(images).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{images} holds no images; allowed are files ending in {', '.join(SUFFIXES)}")
        for file in files:
            try:
                yield np.array(Image.open(file).convert("RGB"))
            except OSError as error:
                raise ValueError(f"{file} is not a readable image ({error}): remove or replace it") from error
    else:
        for batch in images:
            rgb = batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch
            yield from quantise(rgb).permute(0, 2, 3, 1).cpu().numpy()
