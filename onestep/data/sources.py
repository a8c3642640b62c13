"""Data as people have it, opened by its name: prompts, folders of pictures, tables, tar files, embedded sets."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from .images import EMBEDDED, Embedded
from .rows import CAPTIONS, LABELS, PICTURES, Row, Source, Span, Tally, first_of, label_of, sentence, text_of
from .tables import Dataset, Parquet
from .tars import Tars, expand

ALLOWED = (
    f"allowed are {', '.join(EMBEDDED)}, or a folder with one sub-folder of images a class, with images and captions, or "
    "with .parquet or .tar files, a .txt file of prompts, a .parquet or .tar file, or a Hugging Face dataset"
)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def open_source(name: str) -> Source:
    """The source of that name. Raises ValueError where there is none or it cannot be told what it is."""
    if name in EMBEDDED:
        return Embedded(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(name, path)
    if path.suffix == ".tar":
        return Tars(name, expand(name))
    if path.is_file():
        if path.suffix == ".txt":
            return Prompts(name, [path])
        if path.suffix == ".parquet":
            return Parquet(name, [path])
        raise ValueError(f"{name} is a {path.suffix or 'nameless kind of'} file; {ALLOWED}")
    if HUB_NAME.fullmatch(name) and not path.suffix:
        return Dataset.of_hub(name)
    near = get_close_matches(name, EMBEDDED, 1)
    raise ValueError(f"no data {name!r}: {ALLOWED}" + (f"; did you mean --data {near[0]}?" if near else ""))


def _open_folder(name: str, path: Path) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return Dataset.of_disk(name, path)
    files = files_under(path)
    for suffix, kind in ((".parquet", Parquet), (".tar", Tars)):
        found = [file for file in files if file.suffix == suffix]
        if found:
            return kind(name, found)
    if not any(file.suffix.lower() in PICTURES or file.name in METADATA for file in files):
        raise ValueError(f"{name} holds no class folders with images and nothing else that could be read; {ALLOWED}")
    return Folder(name, path, files)


def files_under(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, sorted, but for hidden ones."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        found += files_under(path) if path.is_dir() else [path]
    return found


class Prompts(Source):
    """A text file with one prompt a line; blank lines and lines that start with # are none."""

    kind = "a file of prompts"

    def _rows(self) -> Iterable[Row]:
        for number, line in enumerate(self.files[0].read_bytes().splitlines(), 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                self.ignored.add("not UTF-8", f"line {number}")
                continue
            if not text or text.startswith("#"):
                self.ignored.add("comment" if text else "blank line", f"line {number}")
                continue
            yield Row(f"line {number}", caption=sentence(text))


METADATA = ("metadata.jsonl", "metadata.csv")


class Folder(Source):
    """Pictures in a folder. Captions are in metadata.jsonl or metadata.csv, or in picture.txt beside picture.png.

    Labels are a column of the metadata; without metadata, the sub-folders in sorted order where all pictures are in some.
    """

    kind = "a folder of pictures"

    def __init__(self, name: str, root: Path, files: list[Path]):
        super().__init__(name, files)
        self.root = root

    def _rows(self) -> Iterable[Row]:
        about: dict[str, tuple[str | None, int | None]] = {}
        for path in self.files:
            if path.name in METADATA:
                about.update(self._metadata(path))
        pictures = {self._name(path): path for path in self.files if path.suffix.lower() in PICTURES}
        texts = {} if about else {path.with_suffix(""): path for path in self.files if path.suffix == ".txt"}
        classes = self._classes(pictures) if not about else {}
        for name in sorted({*pictures, *about}):
            picture = pictures.get(name)
            caption, label = about.get(name, (None, classes.get(name.split("/")[0])))
            if picture and picture.with_suffix("") in texts:
                caption = sentence(text_of(texts[picture.with_suffix("")].read_bytes()))
            yield Row(name, Span(picture) if picture else None, caption, label)
        used = {path.with_suffix("") for path in pictures.values()}
        for path in self.files:
            if path.suffix == ".txt" and not about and path.with_suffix("") not in used:
                self.ignored.add("text without a picture", self._name(path))
            elif path.suffix.lower() not in (*PICTURES, ".txt") and path.name not in METADATA:
                self.ignored.add("other file", self._name(path))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _classes(self, pictures: Iterable[str]) -> dict[str, int]:
        if any("/" not in name for name in pictures):
            return {}
        folders = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        return {name: index for index, name in enumerate(folders)}

    def _metadata(self, path: Path) -> Iterator[tuple[str, tuple[str | None, int | None]]]:
        """(picture's name, (caption, label)) of each line; a line that names no picture of the folder is ignored."""
        for number, fields in _records(path, self.ignored):
            name = fields.get("file_name")
            if not isinstance(name, str) or not name:
                self.ignored.add("no file_name", f"{self._name(path)}, line {number}")
            elif name.startswith("/") or ".." in PurePosixPath(name).parts:
                self.ignored.add("file_name outside the folder", f"{self._name(path)}, line {number}")
            else:
                key = self._name(path.parent / PurePosixPath(name))
                yield key, (sentence(first_of(fields, CAPTIONS)), label_of(first_of(fields, LABELS)))


def _records(path: Path, ignored: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields) of a metadata file; lines that cannot be read are counted in `ignored`."""
    if path.suffix == ".csv":
        text = text_of(path.read_bytes())
        if text is None:
            raise ValueError(f"{path} is not UTF-8; save it as UTF-8")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((reader.line_num, fields) for fields in reader)
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            ignored.add("no JSON object", f"{path.name}, line {number}")
