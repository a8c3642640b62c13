"""Batches of conditions and real samples, from whatever data there is and for whatever kind of teacher."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..objectives.base import Batch
from ..rng import Rng
from ..teacher import Teacher
from .clean import Needs, Report, each_picture, scanned
from .images import EMBEDDED, LABELLED, fitted, load_embedded
from .keys import encoder_key
from .rows import Row, Source, decode
from .shards import Rows, Shards
from .sources import open_source

CHUNK = 64
"""Prompts that are embedded at once, and small pictures that are encoded at once."""
PIXELS = CHUNK * 64**2
"""Pixels of pictures that are encoded at once, or one picture: an autoencoder's activations take kilobytes a pixel."""
PROMPTS_PER_SHARD = 256
"""Embeddings of a prompt take up to a few megabytes."""


class Embedder(Protocol):
    """What a teacher that is conditioned on text can do with prompts."""

    def embed(self, prompts: list[str]) -> Rows: ...
    def embed_null(self) -> Rows: ...
    def embedder_key(self) -> dict[str, Any]: ...
    def use_prompts(self, table: Shards, null: Rows, prompts: list[str]) -> None: ...


class Data:
    """Batches as a pure function of the step: each epoch is a permutation seeded by (seed, epoch).

    `real` are samples in x0 units (N, ...), or shards of them as "x_0", and `conditions` (N,) theirs. Without real
    samples the conditions are uniform over 0 .. classes-1. `note` is what a person should know of the data, in a line.
    """

    def __init__(self, real: Tensor | Shards | None, conditions: Tensor | None, classes: int, seed: int, note: str = ""):
        self.real, self.conditions, self.classes, self.seed, self.note = real, conditions, classes, seed, note
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @classmethod
    def of(cls, name: str | None, teacher: Teacher, seed: int, cache: Path, pictures: bool = True) -> "Data":
        """Opens the data of that name, encodes them into the teacher's x0 units and its conditions, once.

        Without `pictures` none are encoded: only the conditions are taken from the data.

        What is encoded is kept in `cache` and found again by every run. Raises ValueError for data that cannot be read
        or that do not fit the teacher.
        """
        text = teacher.conditioned_by == "text"
        if name is None:
            if text:
                raise ValueError("this teacher is conditioned on text: type --data with a .txt file of one prompt a line")
            return cls(None, None, teacher.classes, seed)
        if not pictures and not text:
            if name not in EMBEDDED:
                open_source(name)  # what is named should be there, also where it is not used
            return cls(None, None, teacher.classes, seed)
        if name in LABELLED and not text:
            images, labels = load_embedded(name)
            if tuple(images.shape[1:]) == (teacher.image_shape[0], teacher.image_shape[1], teacher.image_shape[1]):
                return cls(_encoded(images, teacher), _conditions(labels, teacher, name), teacher.classes, seed)
        source = open_source(name)
        needs = (
            Needs(images=None if pictures else False, captions=True)
            if text
            else Needs(images=True, labels=_labelled(teacher))
        )
        report = scanned(source, needs, cache)
        if text:
            conditions = _use_captions(report, cast(Embedder, teacher), cache).to(teacher.device)
        else:
            conditions = _conditions(torch.tensor([row.label or 0 for row in report.rows]), teacher, name)
        if not report.images:
            return cls(None, None, teacher.classes, seed, report.line)
        real = _encode_all(source, report, teacher, cache).to(teacher.device)
        return cls(real, conditions, teacher.classes, seed, report.line)

    def batch(self, step: int, total: int, start: int, stop: int, device: torch.device | str) -> Batch:
        """Rows start .. stop-1 of the global batch of `total` at `step`."""
        rng = Rng(self.seed, step, total, start, stop, device)
        if self.real is None or self.conditions is None:
            return Batch(rng.integers(self.classes), None, rng)
        index = torch.tensor([self._index(step * total + row) for row in range(start, stop)], device=self.conditions.device)
        real = self.real[index]["x_0"] if isinstance(self.real, Shards) else self.real[index]
        return Batch(self.conditions[index], real, rng)

    def _index(self, position: int) -> int:
        assert self.real is not None
        epoch, offset = divmod(position, len(self.real))
        if epoch != self._epoch:
            order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.real), generator=order)
        return int(self._order[offset])


def load_images(name: str, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, channels, size, size) float32 in [-1, 1] and labels (N,) of an embedded data set or another source.

    Pictures of another source are resized (antialiased bicubic) and centre-cropped. Raises ValueError for an unknown one.
    """
    if name in EMBEDDED:
        return load_embedded(name)
    rows = [row for row in open_source(name).rows if row.image and row.label is not None]
    return torch.stack(_fitted(rows, channels, size)), torch.tensor([row.label for row in rows])


def _labelled(teacher: Teacher) -> bool:
    return teacher.conditioned_by == "class" and teacher.classes > 1


def _conditions(labels: Tensor, teacher: Teacher, name: str) -> Tensor:
    """Class labels on the teacher's device; zeros for a teacher without classes. Raises ValueError for too large ones."""
    if not _labelled(teacher):
        return torch.zeros_like(labels, device=teacher.device)
    most = int(labels.max())
    if most >= teacher.classes:
        raise ValueError(
            f"{name} has the class label {most}, and this teacher knows the classes 0 .. {teacher.classes - 1}; "
            "type --data with data of those classes"
        )
    return labels.to(teacher.device)


def _fitted(rows: Sequence[Row], channels: int, size: int) -> list[Tensor]:
    def use(data: bytes | None) -> Tensor | None:
        image = decode(data) if data else None
        return None if image is None else fitted(image, channels, size)

    pictures = list(each_picture(rows, use))
    for row, picture in zip(rows, pictures):
        if picture is None:
            raise ValueError(f"the picture {row.name} can no longer be read; leave the data as they are and start again")
    return [picture for picture in pictures if picture is not None]


@torch.no_grad()
def _encoded(images: Tensor, teacher: Teacher) -> Tensor:
    rows = min(CHUNK, max(1, PIXELS // teacher.resolution**2))
    return torch.cat([teacher.to_x0(chunk.to(teacher.device)) for chunk in images.split(rows)])


def _encode_all(source: Source, report: Report, teacher: Teacher, cache: Path) -> Shards:
    """x0 of every kept row. The key has the pixels and not the files, so that copied or renamed data are found again."""

    def make(start: int, stop: int) -> Rows:
        rows = [source.rows[kept.row] for kept in report.rows[start:stop]]
        return {"x_0": _encoded(torch.stack(_fitted(rows, *teacher.image_shape)), teacher).cpu()}

    key = {"pixels": _digest([row.pixels for row in report.rows]), "encoder": encoder_key(teacher), "fit": "bicubic, centre"}
    return Shards.build(cache, "images", key, report.kept, make)


def _use_captions(report: Report, teacher: Embedder, cache: Path) -> Tensor:
    """Give the teacher the embeddings of all captions; returns each row's number of its caption, shape (N,)."""
    prompts = list(dict.fromkeys(row.caption for row in report.rows if row.caption is not None))
    number = {prompt: index for index, prompt in enumerate(prompts)}

    def make(start: int, stop: int) -> Rows:
        parts = [teacher.embed(prompts[first : min(first + CHUNK, stop)]) for first in range(start, stop, CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    key = {"embedder": teacher.embedder_key()}
    table = Shards.build(cache, "text", key | {"prompts": _digest(prompts)}, len(prompts), make, PROMPTS_PER_SHARD)
    null = Shards.build(cache, "text-null", key, 1, lambda start, stop: teacher.embed_null())
    teacher.use_prompts(table, null[torch.zeros(1, dtype=torch.long)], prompts)
    return torch.tensor([number[row.caption] for row in report.rows if row.caption is not None])


def _digest(values: Sequence[str | None]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
