"""Cached pairs of noise and teacher sample."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ..rng import Rng
from ..teacher import Teacher
from .keys import weights_key
from .shards import INDEX, Rows, Shards

ROWS_PER_SHARD = 256


class PairCache:
    """(z, teacher sample, condition) triples on disk, made once for a (teacher, count, steps, guidance, seed, sampler).

    They are found again later; making them goes on where it was killed. `half` keeps the samples in fp16, at half their
    size. The teacher makes `batch` of them at once, on which nothing else depends.
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
    ):
        self.teacher, self.count, self.steps, self.guidance, self.seed = teacher, count, steps, guidance, seed
        self.sampler, self.batch = sampler, batch
        self.kept = torch.float16 if half else torch.float32
        scheduler = {k: v for k, v in sorted(teacher.pipeline.scheduler.config.items()) if not k.startswith("_")}
        key = {
            "teacher": type(teacher).__name__,
            "shape": list(teacher.shape),
            "weights": weights_key(teacher.denoiser.network),
            "scheduler": repr(scheduler),
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "sampler": sampler,
            "half": half,
            "conditions": hashlib.sha256(repr(teacher.named(list(range(teacher.classes)))).encode()).hexdigest(),
        }
        place = Shards.folder_of(folder, "pairs", key, count, ROWS_PER_SHARD)
        if not (place / INDEX).is_file():
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
