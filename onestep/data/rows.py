"""What every kind of source is read to: rows with a picture that is not decoded yet, a caption, a class label."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

CAPTIONS = ("text", "caption", "prompt")
LABELS = ("label", "labels", "cls")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
FEW = 3
"""Names that are shown of the rows with one fault."""


class Blob(Protocol):
    """Something that a picture's encoded bytes can be read from; None where there turns out to be none."""

    def read(self) -> bytes | None: ...


@dataclass(frozen=True)
class Span:
    """`size` bytes of a file from `offset` on; by default the whole file."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Row:
    """One row; `name` is what a person finds it by."""

    name: str
    image: Blob | None = None
    caption: str | None = None
    label: int | None = None


@dataclass
class Tally:
    """Counts by reason, with the first few names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= FEW:
            self.names.setdefault(reason, []).append(name)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())


class Source(ABC):
    """Rows of one kind of data. Making one looks at names and sizes only; `rows` reads what is needed but pictures."""

    kind: str
    """What it is, in words."""

    def __init__(self, name: str, files: Sequence[Path] = ()):
        """`name` is what the user typed; `files` are all that the rows depend on."""
        self.name, self.files = name, files
        self.ignored = Tally()

    @property
    def fingerprint(self) -> str:
        """Changes with the names, sizes and times of the files."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for path in self.files:
            about = path.stat()
            digest.update(f"\n{os.path.abspath(path)}\t{about.st_size}\t{about.st_mtime_ns}".encode())
        return digest.hexdigest()

    @cached_property
    def rows(self) -> list[Row]:
        """All rows in an order that depends on nothing but the data; what was no row at all is counted in `ignored`."""
        return list(self._rows())

    @abstractmethod
    def _rows(self) -> Iterable[Row]: ...


def text_of(data: bytes) -> str | None:
    """UTF-8 bytes as text, None where they are something else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def sentence(text: Any) -> str | None:
    """A caption on one line; the first where there are several; None for anything that is no text or has no word."""
    if isinstance(text, list | tuple):
        text = text[0] if text else None
    return (" ".join(text.split()) or None) if isinstance(text, str) else None


def label_of(value: Any) -> int | None:
    """A class label from a number or its digits; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < 2**31 else None
    return int(value) if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) < 10 else None


def first_of(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of these fields that is there, or None."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def decode(data: bytes) -> Image.Image | None:
    """The picture, wholly decoded and upright, or None where it is corrupt."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error and more on bad bytes
        return None
