"""Tables with a column of pictures: parquet files, and Hugging Face datasets on disk or from the hub."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .rows import CAPTIONS, LABELS, Blob, Row, Source, label_of, sentence

IMAGES = ("image", "img", "picture", "jpg", "png", "webp")
INSTALL = "type pip install 'onestep-diffusion[data]'"


@dataclass(frozen=True)
class Cell:
    """A picture in row `row` of a dataset's column: bytes, or the path of a file."""

    table: Any
    row: int
    column: str
    folder: Path | None
    """The only folder that paths may lead into; None: the dataset's own code has put the files where they are."""

    def read(self) -> bytes | None:
        return _bytes(self.table[self.row][self.column], self.folder)


@dataclass(frozen=True)
class ParquetCell:
    """A picture in row `row` of a row group."""

    path: Path
    group: int
    row: int
    column: str

    def read(self) -> bytes | None:
        cell = _group(self.path, self.path.stat().st_mtime_ns, self.group, self.column)[self.row].as_py()
        return _bytes(cell, self.path.parent)


def _bytes(value: Any, folder: Path | None) -> bytes | None:
    """Of a cell: bytes, or {bytes, path} of which one may be missing. Raises ValueError for a path out of the folder."""
    if not isinstance(value, dict):
        return value
    if value.get("bytes") is None and value.get("path"):
        path = Path(value["path"]) if folder is None else folder / value["path"]
        if folder is not None and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{value['path']} is outside of {folder}; copy the picture there")
        return path.read_bytes()
    return value.get("bytes")


@lru_cache(maxsize=2)
def _group(path: Path, changed: int, group: int, column: str) -> Any:
    """A column of one row group: rows are read in order, so each group is read once."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path).read_row_group(group, columns=[column]).column(0).combine_chunks()


def _rows_of(prefix: str, count: int, captions: Any, labels: Any, images: Sequence[Blob] | None) -> Iterable[Row]:
    """Rows from columns, any of which may be missing."""
    for i in range(count):
        caption, label = captions[i] if captions else None, labels[i] if labels else None
        yield Row(f"{prefix}{i}", images[i] if images else None, sentence(caption), label_of(label))


def _column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that is there."""
    there = set(names)
    return next((name for name in wanted if name in there), None)


class Parquet(Source):
    """Parquet files: a column of pictures ({bytes, path} or bytes), one of captions or prompts, one of labels."""

    kind = "parquet files"

    def _rows(self) -> Iterable[Row]:
        try:
            import pyarrow as pa
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ValueError(f"{self.name}: parquet files are read by pyarrow, which is missing; {INSTALL}") from None
        for path in self.files:
            try:
                file = ParquetFile(path)
                schema = file.schema_arrow
                kinds = {name: schema.field(name).type for name in schema.names}
                image = _column([n for n in kinds if _holds_pictures(n, kinds[n], pa.types)], (*IMAGES, *kinds))
                captions, labels = (
                    file.read(columns=[name]).column(0).to_pylist() if name else None
                    for name in (_column(kinds, CAPTIONS), _column(kinds, LABELS))
                )
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            except (OSError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path} cannot be read as parquet: {reason}; fetch it again or leave it out") from error
            places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
            images = [ParquetCell(path, *place, image) for place in places] if image else None
            yield from _rows_of(f"{path.name}, row ", sum(sizes), captions, labels, images)


def _holds_pictures(name: str, kind: Any, types: Any) -> bool:
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return name in IMAGES and (types.is_binary(kind) or types.is_large_binary(kind))


class Dataset(Source):
    """A Hugging Face dataset, with a column of pictures (an Image feature), one of captions or prompts, one of labels."""

    kind = "a Hugging Face dataset"

    def __init__(self, name: str, folder: Path | None):
        """`folder` is what save_to_disk wrote; without one, `name` is that of a dataset on the hub, which is fetched."""
        super().__init__(name, sorted(path for path in folder.iterdir() if path.is_file()) if folder else ())
        self.folder = folder
        self._hub = None if folder else _from_hub(name)

    @classmethod
    def of_hub(cls, name: str) -> "Dataset":
        """The split "train" of a dataset on the hub. Raises ValueError where it cannot be had."""
        return cls(name, None)

    @classmethod
    def of_disk(cls, name: str, folder: Path) -> "Dataset":
        """What save_to_disk wrote: of several splits, "train". Raises ValueError where none is called so."""
        about = folder / "dataset_dict.json"
        if not about.is_file():
            return cls(name, folder)
        try:
            splits = json.loads(about.read_text())["splits"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{about} cannot be read; save the dataset again") from error
        chosen = splits[0] if len(splits) == 1 else "train"
        if chosen not in splits or not (folder / chosen).is_dir():
            raise ValueError(f"{name} has no split train; type one of {', '.join(f'{name}/{each}' for each in splits)}")
        return cls(name, folder / chosen)

    @property
    def fingerprint(self) -> str:
        return super().fingerprint if self._hub is None else f"{self.name} {self._hub._fingerprint}"

    def _rows(self) -> Iterable[Row]:
        datasets = _datasets(self.name)
        table = self._hub
        if table is None:
            try:
                table = datasets.load_from_disk(str(self.folder))
            except Exception as error:  # of many kinds, from arrow, JSON and the file system
                reason = " ".join(str(error).split())
                raise ValueError(f"{self.folder} cannot be read as a dataset: {reason}; save it again") from error
        names = table.column_names
        image = _column([name for name in names if isinstance(table.features[name], datasets.Image)], (*IMAGES, *names))
        texts, labels = (name and table[name] for name in (_column(names, CAPTIONS), _column(names, LABELS)))
        images = None
        if image:
            encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
            images = [Cell(encoded, row, image, self.folder) for row in range(len(table))]
        yield from _rows_of("row ", len(table), texts and texts[:], labels and labels[:], images)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: datasets are read by the package datasets, which is missing; {INSTALL}") from None
    return datasets


def _from_hub(name: str) -> Any:
    datasets = _datasets(name)
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its lines on every retry would hide the one that matters
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # of many kinds, from the network, the hub and the files there
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no data {name!r}: no such file or folder is here, and the Hugging Face hub gives no such dataset with a split "
            f"train ({reason[:200]}). Allowed is a path that exists, or a dataset's owner/name that this machine can reach"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
