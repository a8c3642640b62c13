"""Pictures as data URIs, so that the page needs no other file."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

WIDEST = 1600
"""Pixels; wider pictures are made smaller, and are then no longer stored without loss."""
THUMBNAIL = 400


@dataclass(frozen=True)
class Picture:
    """What an <img> needs: the file's bytes as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def picture(path: Path, widest: int = WIDEST) -> Picture:
    """A picture file, made smaller where it is wider than that. Raises ValueError where it is damaged."""
    try:
        with Image.open(path) as file:
            return encoded(file.convert("RGB"), widest)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} is no readable picture") from error


def encoded(image: Image.Image, widest: int = WIDEST) -> Picture:
    """WebP: without loss where the picture keeps its size."""
    scale, file = min(1.0, widest / image.width), io.BytesIO()
    if scale < 1:
        image = image.resize((widest, max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
        image.save(file, "webp", quality=85)
    else:
        image.save(file, "webp", lossless=True)
    return Picture(f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size)
