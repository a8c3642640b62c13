"""Points of a teacher's guided trajectories, every one of which has a guidance of its own."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..denoiser import Cond, Denoiser, stack
from ..rng import Rng
from ..teacher import Teacher
from ..trajectory import Grid, jump
from .keys import weights_key
from .shards import INDEX, Rows, Shards

TRAJECTORIES_PER_SHARD = 64


class Point(NamedTuple):
    """A batch of points: x_t and the guided output there, (B, ...), and level, time, guidance and condition, (B,)."""

    x_t: Tensor
    level: Tensor
    t: Tensor
    output: Tensor
    guidance: Tensor
    conditions: Tensor


def guided_output(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, guidance: Tensor) -> Tensor:
    """o_uncond + w (o_cond - o_uncond) of the network's raw outputs, one pass over the doubled batch; w is (B,)."""
    o_cond, o_uncond = denoiser.output(torch.cat([x_t, x_t]), torch.cat([t, t]), stack(cond, uncond)).chunk(2)
    return o_uncond + guidance.view(-1, *(1,) * (x_t.ndim - 1)).to(o_cond) * (o_cond - o_uncond)


@torch.no_grad()
def guided_way(
    denoiser: Denoiser, grid: Grid, z: Tensor, cond: Cond, uncond: Cond, guidance: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(level, x_t, guided output) at every level of `grid`, from its last one down, as DDIM passes through them from z."""
    x_t = denoiser.schedule.init_sigma * z
    for number in range(grid.size, 0, -1):
        level = torch.full((len(z),), number, device=z.device)
        output = guided_output(denoiser, x_t, grid.time(level, x_t), cond, uncond, guidance)
        yield level, x_t, output
        here = grid.levels(level, x_t)
        x_0 = denoiser.prediction.to_x0(output, x_t, *here)
        x_t = jump(x_t, x_0, here, grid.levels(level - 1, x_t))


class GuidedTrajectories:
    """`points` of the `steps` steps of each of `count` trajectories, on disk in fp16, with w ~ U[low, high] for each.

    Made once for a (teacher, count, steps, points, low, high, seed), and found again later. Trajectory j keeps every
    (steps / points)-th step from the (j mod (steps / points))-th on, so that all steps are kept alike. A row is a
    point, and a batch is drawn over all of them: points of one trajectory have the same guidance and condition.
    The teacher makes `batch` trajectories at once.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        count: int,
        steps: int,
        points: int,
        low: float,
        high: float,
        seed: int = 0,
        batch: int = 64,
    ):
        """`points` divides `steps`."""
        assert steps % points == 0
        self.teacher, self.points, self.low, self.high, self.seed, self.batch = teacher, points, low, high, seed, batch
        self.grid = Grid(teacher.denoiser.schedule, steps, device=teacher.device)
        self.count = count * points
        scheduler = {k: v for k, v in sorted(teacher.pipeline.scheduler.config.items()) if not k.startswith("_")}
        key = {
            "teacher": type(teacher).__name__,
            "shape": list(teacher.shape),
            "weights": weights_key(teacher.denoiser.network),
            "scheduler": repr(scheduler),
            "steps": steps,
            "points": points,
            "guidance": [low, high],
            "seed": seed,
            "conditions": hashlib.sha256(repr(teacher.named(list(range(teacher.classes)))).encode()).hexdigest(),
        }
        per_shard = points * TRAJECTORIES_PER_SHARD
        place = Shards.folder_of(folder, "guided-trajectories", key, self.count, per_shard)
        if not (place / INDEX).is_file():
            print(f"{count:,} guided trajectories, {self.count * self.row_bytes() / 1e6:,.1f} MB in {place}", flush=True)
        self.rows = Shards.build(folder, "guided-trajectories", key, self.count, self._make, per_shard).to(teacher.device)

    def row_bytes(self) -> int:
        """Size of one point: x_t and output in fp16, level and condition as integers, and its guidance."""
        return 2 * torch.Size(self.teacher.shape).numel() * 2 + 8 + 8 + 4

    def _make(self, start: int, stop: int) -> Rows:
        """Points start .. stop-1, whole trajectories: noise, guidance, condition are a function of (seed, start)."""
        first, last = start // self.points, stop // self.points
        rng = Rng(self.seed, first, last - first, device=self.teacher.device)
        z, conditions = rng.normal(self.teacher.shape), rng.integers(self.teacher.classes)
        guidance, stride = rng.uniform(self.low, self.high), self.grid.size // self.points
        offsets = torch.arange(first, last, device=z.device) % stride
        drawn = zip(*(each.split(self.batch) for each in (z, conditions, guidance, offsets)))
        parts = [self._kept(*each) for each in drawn]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _kept(self, z: Tensor, conditions: Tensor, guidance: Tensor, offsets: Tensor) -> Rows:
        """Rows of some trajectories, the points of each one after another; the noisiest first."""
        cond, uncond = self.teacher.encode(conditions)
        assert uncond is not None
        stride, kept = self.grid.size // self.points, list[tuple[Tensor, ...]]()
        for number, way in enumerate(guided_way(self.teacher.denoiser, self.grid, z, cond, uncond, guidance)):
            if number % stride == 0:
                kept.append(way)
            here = offsets == number % stride
            kept[-1] = tuple(torch.where(match(here, new), new, old) for new, old in zip(way, kept[-1]))
        level, x_t, output = (torch.stack(each, 1).flatten(0, 1) for each in zip(*kept))
        again = [each.repeat_interleave(self.points) for each in (guidance, conditions)]
        half = {"x_t": x_t.to("cpu", torch.float16), "output": output.to("cpu", torch.float16)}
        return half | {"level": level.cpu(), "guidance": again[0].cpu(), "conditions": again[1].cpu()}

    def draw(self, rng: Rng) -> Point:
        """A batch of points, drawn with replacement."""
        return self[rng.integers(self.count)]

    def __getitem__(self, index: Tensor) -> Point:
        """The points of these rows: point k of trajectory j is row j * points + k."""
        rows = self.rows[index]
        x_t, output, level = rows["x_t"].float(), rows["output"].float(), rows["level"]
        return Point(x_t, level, self.grid.time(level, x_t), output, rows["guidance"], rows["conditions"])


def match(flags: Tensor, like: Tensor) -> Tensor:
    """flags, (B,), shaped to broadcast against `like`."""
    return flags.view(-1, *(1,) * (like.ndim - 1))
