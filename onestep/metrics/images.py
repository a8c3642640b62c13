"""Images on their way to an extractor: 8-bit pixels, as a saved PNG holds them, from tensors or from files of any kind."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LOSSY = frozenset({"JPEG", "MPO"})
"""Pillow's names of formats that always change pixels; WebP may or may not, and its files do not say."""


def quantise(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8 as diffusers' numpy_to_pil does, so that scores are those of the saved PNGs."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def files_of(folder: str | Path) -> list[Path]:
    """The image files in a folder and the folders in it, sorted by path. Raises ValueError where there are none."""
    if not Path(folder).is_dir():
        raise ValueError(f"no folder {folder}; name a folder of images")
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{folder} holds no images; allowed are files ending in {', '.join(SUFFIXES)}")
    return files


class Survey:
    """Reads image files, and remembers what they are: `formats`, `sizes` as (width, height), how many were transparent."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.transparent = 0
        self._lock = Lock()

    def read(self, file: str | Path) -> np.ndarray:
        """uint8 (H, W, 3). Grey is repeated, a palette looked up, 16 bits become round(v / 257); what is transparent lies
        on white. A file with several frames gives the first; an orientation in EXIF is ignored, as clean-fid does.

        Raises ValueError for a file that is no image, is cut off, or has pixels without a known range.
        """
        try:
            with Image.open(file) as image:
                image.load()
                pixels, transparent = _rgb(image)
                with self._lock:  # several threads read
                    self.formats[image.format or "?"] += 1
                    self.sizes[image.size] += 1
                    self.transparent += transparent
                return pixels
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} is not a readable image ({error}): remove or replace it") from error

    def gather(self) -> None:
        """Take in what the other processes of the group have read."""
        if PartialState().num_processes > 1:
            found = gather_object([(self.formats, self.sizes, self.transparent)])
            self.formats = sum((each[0] for each in found), Counter())
            self.sizes = sum((each[1] for each in found), Counter())
            self.transparent = sum(each[2] for each in found)

    def warn(self, folder: str | Path, reference_formats: Iterable[str] | None = None, one_size: bool = False) -> None:
        """Warn of what changes a score without anyone seeing it.

        `reference_formats` are those of the real images, None where nobody knows; `one_size` where all were made one size.
        """
        if self.transparent:
            warnings.warn(
                f"{self.transparent} images of {folder} are transparent: scored as they look on white", stacklevel=2
            )
        if len(self.sizes) > 1 and not one_size:
            shown = ", ".join(f"{w}x{h} ({n})" for (w, h), n in self.sizes.most_common(3))
            warnings.warn(
                f"{folder} has images of {len(self.sizes)} sizes, as {shown}: each is resized by itself, stretched to the "
                "extractor's square. Type --size with one number to crop and resize all alike",
                stacklevel=2,
            )
        lossy = sum(self.formats[name] for name in LOSSY)
        if lossy and reference_formats is not None and not LOSSY & set(reference_formats):
            warnings.warn(
                f"{lossy} images of {folder} are JPEG, and the reference is not: compression alone changes a distance. "
                "Score images that were saved as PNG",
                stacklevel=2,
            )

    def details(self) -> dict[str, Any]:
        """Formats, sizes (the ten most frequent) and the number of transparent images, for a row."""
        sizes = {f"{w}x{h}": n for (w, h), n in self.sizes.most_common(10)}
        return {"formats": dict(self.formats), "sizes": sizes, "transparent": self.transparent}


def _rgb(image: Image.Image) -> tuple[np.ndarray, bool]:
    """uint8 (H, W, 3), and whether white was put behind it. Raises ValueError for pixels without a known range."""
    if image.mode == "F":
        raise ValueError("its pixels are floats without a known range; save it with 8 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save it with 8 bits")
        return np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2), False
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        if np.asarray(layered)[..., 3].min() < 255:
            return np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")), True
    return np.array(image.convert("RGB")), False


def fitted(image: np.ndarray, size: int | None) -> np.ndarray:
    """The square around the centre of uint8 (H, W, 3), resized to (size, size, 3) by Lanczos; as it is for None.

    As DMD2's evaluator does it: torchvision's center_crop to the shorter side, then Pillow.
    """
    if size is None:
        return image
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.array(square.resize((size, size), Image.Resampling.LANCZOS))


def pixels_of(images: str | Path | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Single images as uint8 (H, W, 3), from a folder (sorted, nested) or from batches (B, 1 or 3, H, W) in [0, 1]."""
    if isinstance(images, (str, Path)):
        survey = Survey()
        for file in files_of(images):
            yield survey.read(file)
        survey.warn(images)
    else:
        for batch in images:
            rgb = batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch
            yield from quantise(rgb).permute(0, 2, 3, 1).cpu().numpy()
