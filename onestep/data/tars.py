"""WebDataset tar files: members of one base name are one row. Nothing is unpacked; members are read where they lie."""

import glob
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .rows import CAPTIONS, LABELS, PICTURES, Row, Source, Span, first_of, label_of, sentence, text_of

BRACES = re.compile(r"\{([^{}]+)\}")


def expand(pattern: str) -> list[Path]:
    """The tar files of a name with {000..012}, {a,b} or * in it. Raises ValueError where one is missing."""
    names = sorted(glob.glob(pattern)) if "*" in pattern else [*_braces(pattern)]
    paths = [Path(name).expanduser() for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(
            f"no file {missing[0] if missing else pattern}; allowed are existing .tar files, as in {{000..012}}.tar"
        )
    return paths


def _braces(pattern: str) -> Iterator[str]:
    found = BRACES.search(pattern)
    if not found:
        yield pattern
        return
    low, dots, high = found[1].partition("..")
    parts = found[1].split(",")
    if dots and low.isdecimal() and high.isdecimal():
        parts = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    for part in parts:
        yield from _braces(pattern[: found.start()] + part + pattern[found.end() :])


class Tars(Source):
    """Rows are base names with a picture, a caption (txt, or json with text, caption or prompt), a label (cls or json)."""

    kind = "WebDataset tar files"

    def _rows(self) -> Iterable[Row]:
        for path in self.files:
            parts: dict[str, dict[str, Span]] = {}
            for name, span in self._members(path):
                key, _, ending = PurePosixPath(name).name.partition(".")
                base = str(PurePosixPath(name).parent / key)
                parts.setdefault(base, {})[ending.rpartition(".")[2].lower()] = span
            for base, members in parts.items():
                yield self._row(f"{path.name}/{base}", members)

    def _members(self, path: Path) -> Iterator[tuple[str, Span]]:
        """Name and place of every plain file. Raises ValueError for a broken tar or a name that leaves its folder."""
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    parts = PurePosixPath(member.name.replace("\\", "/")).parts
                    if ".." in parts or parts[:1] == ("/",) or ":" in (parts or ("",))[0]:
                        raise ValueError(
                            f"{path} holds a member {member.name!r} that leaves its folder; such a tar is not to be "
                            "trusted: leave it out"
                        )
                    if member.isreg() and not member.issparse():
                        yield member.name, Span(path, member.offset_data, member.size)
                    elif not member.isdir():
                        self.ignored.add("no plain file", f"{path.name}/{member.name}")
        except (OSError, tarfile.TarError) as error:
            raise ValueError(
                f"{path} is no whole tar file ({error}); fetch it again, or leave it out; a compressed one must be unpacked"
            ) from error

    def _row(self, name: str, members: dict[str, Span]) -> Row:
        image = next((span for ending, span in members.items() if f".{ending}" in PICTURES), None)
        fields: dict[str, Any] = {}
        if "json" in members:
            try:
                fields = dict(json.loads(members["json"].read()))
            except (ValueError, TypeError, RecursionError):
                self.ignored.add("no JSON object", f"{name}.json")
        caption = sentence(first_of(fields, CAPTIONS))
        texts = {ending: text_of(members[ending].read()) for ending in ("txt", "cls") if ending in members}
        return Row(name, image, caption or sentence(texts.get("txt")), label_of(texts.get("cls", first_of(fields, LABELS))))
