"""Which rows of a source can be used, and why the others cannot."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from itertools import repeat
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from .rows import Row, Source, Tally, decode
from .shards import locked, write_json

T = TypeVar("T")

VERSION = 1
"""Of what is kept of a scan."""
CHUNK = 256
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Needs:
    """What a row must have; images None: where any row of the source has one."""

    images: bool | None = None
    captions: bool = False
    labels: bool = False
    side: int = 0
    """Least side of a picture, in pixels."""


@dataclass(frozen=True)
class Kept:
    """A row that can be used: its number in the source, its caption and label, and a hash of its decoded pixels."""

    row: int
    caption: str | None
    label: int | None
    pixels: str | None


@dataclass
class Report:
    """What a scan found. `ignored` is what was no row at all: blank lines, other files."""

    name: str
    kind: str
    rows: list[Kept]
    dropped: Tally
    ignored: Tally

    @property
    def kept(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> bool:
        """Whether the rows have pictures that were looked at."""
        return self.rows[0].pixels is not None

    @property
    def line(self) -> str:
        """For the start of a run."""
        text = f"data: {self.name}, {self.kept:,} of {self.kept + self.dropped.total:,} rows"
        return text + (f"; dropped {self.dropped}" if self.dropped.total else "")

    @property
    def table(self) -> str:
        """For a person who checks data before a run."""
        captions = [row.caption for row in self.rows if row.caption is not None]
        labels = {row.label for row in self.rows if row.label is not None}
        lines = [f"{self.name}: {self.kind}", _line("kept", self.kept)]
        lines.append(_line("  with an image", sum(row.pixels is not None for row in self.rows)))
        lines.append(_line("  with a caption", len(captions), f"{len(set(captions)):,} different" if captions else ""))
        labelled = sum(row.label is not None for row in self.rows)
        lines.append(_line("  with a label", labelled, f"{len(labels):,} different" if labels else ""))
        for title, tally in (("dropped", self.dropped), ("ignored, no rows", self.ignored)):
            lines.append(_line(title, tally.total))
            for reason, count in tally.counts.items():
                more = ", ..." if count > len(tally.names[reason]) else ""
                lines.append(_line(f"  {reason}", count, ", ".join(tally.names[reason]) + more))
        return "\n".join(lines)


def _line(title: str, count: int, note: str = "") -> str:
    return f"{title:28}{count:>10,}  {note}".rstrip()


def scan(source: Source, needs: Needs) -> Report:
    """Look at every row, pictures decoded. Rows that cannot be used are counted by reason, the first one that holds.

    Raises ValueError, with the reasons, where no row can be used.
    """
    rows = source.rows
    with_images = any(row.image for row in rows) if needs.images is None else needs.images
    report = Report(source.name, source.kind, [], Tally(), source.ignored)
    pictures: Iterable[_Picture | None] = each_picture(rows, _look) if with_images else repeat(None)
    seen: dict[bytes, str] = {}
    progress = tqdm(rows, desc="looking at the data", unit="row", leave=False, disable=None)
    for number, (row, picture) in enumerate(zip(progress, pictures)):
        fault, name = _fault(row, picture, needs, with_images), row.name
        if fault is None:
            same = repr((picture and picture.pixels, row.caption, row.label))
            first = seen.setdefault(hashlib.sha256(same.encode()).digest(), name)
            if first is not name:
                fault, name = "duplicate", f"{name} (of {first})"
        if fault is None:
            report.rows.append(Kept(number, row.caption, row.label, picture.pixels if picture else None))
        else:
            report.dropped.add(fault, name)
    if not report.rows:
        raise ValueError(
            f"no row of {source.name} ({source.kind}) can be used: {report.dropped or report.ignored or 'it is empty'}; "
            f"type --data with other data, or see what is wrong: python -m onestep.data check {source.name}"
        )
    return report


def scanned(source: Source, needs: Needs, cache: Path) -> Report:
    """`scan`, with its findings kept in `cache` for as long as the data do not change."""
    key = hashlib.sha256(repr((VERSION, source.fingerprint, astuple(needs))).encode()).hexdigest()[:16]
    path = cache / f"scan-{key}.json"
    if not path.is_file():
        with locked(cache, f".{path.stem}.lock"):
            if not path.is_file():
                write_json(path, asdict(scan(source, needs)))
    try:
        found = json.loads(path.read_text())
        rows = [Kept(**row) for row in found.pop("rows")]
        dropped, ignored = Tally(**found.pop("dropped")), Tally(**found.pop("ignored"))
        return Report(source.name, source.kind, rows, dropped, ignored)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has changed since it was written; delete it and start again: it is made anew") from error


def each_picture(rows: Sequence[Row], use: Callable[[bytes | None], T]) -> Iterator[T]:
    """use(encoded bytes) of every row in order, None where it has none: read one by one, used by several threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(rows), CHUNK):
            yield from pool.map(use, [_read(row) for row in rows[start : start + CHUNK]])


def _read(row: Row) -> bytes | None:
    try:
        return row.image.read() if row.image else None
    except (OSError, ValueError):
        return b""  # a file that is named but cannot be read is as good as a corrupt one


@dataclass(frozen=True)
class _Picture:
    """What a scan keeps of a picture; `pixels`, their hash, is None where it is corrupt."""

    side: int
    pixels: str | None


def _look(data: bytes | None) -> _Picture | None:
    if data is None:
        return None
    image = decode(data)
    if image is None:
        return _Picture(0, None)
    palette = image.getpalette() if image.mode == "P" else None
    return _Picture(
        min(image.size), hashlib.sha256(f"{image.mode} {image.size} {palette}".encode() + image.tobytes()).hexdigest()
    )


def _fault(row: Row, picture: _Picture | None, needs: Needs, with_images: bool) -> str | None:
    """Why a row cannot be used; `picture` is None where it has none."""
    if with_images and picture is None:
        return "no image"
    if row.caption is None and (needs.captions or not with_images):
        return "no caption"
    if row.label is None and needs.labels:
        return "no label"
    if picture is not None and picture.pixels is None:
        return "corrupt image"
    if picture is not None and picture.side < needs.side:
        return "too small"
    return None
