"""Cached pairs of noise and teacher sample."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ..rng import Rng
from ..teacher import Teacher
from .keys import weights_key
from .shards import INDEX, Rows, Shards, locked, write_json

ROWS_PER_SHARD = 256


class PairCache:
    """(z, teacher sample, condition) triples on disk, made once for a (teacher, count, steps, guidance, seed, sampler).

    They are found again later; making them goes on where it was killed. `half` keeps the samples in fp16, at half their
    size. The teacher makes `batch` of them at once, on which nothing else depends. Their size is printed before they are.

    `note` is for a teacher whose network is in training: a file that holds the key of the weights which the samples are
    of. With `now` these are the network's weights of this moment, and the file is written; else it is read, and the samples
    have to be there already. Raises ValueError where they are not.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        count: int,
        steps: int,
        guidance: float,
        seed: int = 0,
        half: bool = False,
        sampler: str = "ddim",
        batch: int = 128,
        note: Path | None = None,
        now: bool = True,
    ):
        self.teacher, self.count, self.steps, self.guidance, self.seed = teacher, count, steps, guidance, seed
        self.sampler, self.batch = sampler, batch
        self.kept = torch.float16 if half else torch.float32
        scheduler = {k: v for k, v in sorted(teacher.pipeline.scheduler.config.items()) if not k.startswith("_")}
        key = {
            "teacher": type(teacher).__name__,
            "shape": list(teacher.shape),
            "weights": noted(note) if note and not now else weights_key(teacher.denoiser.network),
            "scheduler": repr(scheduler),
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "sampler": sampler,
            "half": half,
            "conditions": hashlib.sha256(repr(teacher.named(list(range(teacher.classes)))).encode()).hexdigest(),
        }
        place = Shards.folder_of(folder, "pairs", key, count, ROWS_PER_SHARD)
        if note and now:
            with locked(note.parent, f"{note.name}.lock"):
                write_json(note, {"weights": key["weights"]})
        if not (place / INDEX).is_file():
            if note and not now:
                raise ValueError(f"the pairs in {place}, which this run has made, are not there: type --restart")
            size = count * (torch.Size(teacher.shape).numel() * (4 + self.kept.itemsize) + 8)
            print(f"{count:,} pairs, {size / 1e6:,.1f} MB in {place}", flush=True)
        self.rows = Shards.build(folder, "pairs", key, count, self._make, ROWS_PER_SHARD).to(teacher.device)

    def _make(self, start: int, stop: int) -> Rows:
        """Pairs start .. stop-1: noise and conditions are a pure function of (seed, start)."""
        rng = Rng(self.seed, start, stop - start, device=self.teacher.device)
        z, conditions = rng.normal(self.teacher.shape), rng.integers(self.teacher.classes)
        y = [
            self.teacher.sample(some, *self.teacher.encode(theirs), self.guidance, self.steps, self.sampler).to(
                "cpu", self.kept
            )
            for some, theirs in zip(z.split(self.batch), conditions.split(self.batch))
        ]
        return {"z": z, "y": torch.cat(y), "conditions": conditions}

    def draw(self, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """A batch drawn with replacement: noise and sample (B, ...), conditions (B,)."""
        rows = self.rows[rng.integers(self.count)]
        return rows["z"], rows["y"].to(rows["z"].dtype), rows["conditions"]


def noted(note: Path) -> str:
    """The key that a note holds. Raises ValueError where it is missing or damaged."""
    try:
        return str(json.loads(note.read_text())["weights"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{note}, which this run has written, cannot be read: start over with --restart") from error
