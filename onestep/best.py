"""The best averaged student of a run so far, by its Fréchet distance on the teacher's protocol, kept for good."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import TrainConfig
from .denoiser import unwrap
from .files import fsync, replaced, save_tensors, sha256_of
from .generator import Generator
from .metrics.frechet import frechet_distance
from .metrics.protocol import PROTOCOLS, protocol_of
from .metrics.score import score
from .teacher import Teacher

STATE = "state.json"


@dataclass(frozen=True)
class Kept:
    """What is in `checkpoints/best`: the student of a step, and the distance it was kept for."""

    step: int
    metric: str
    value: float
    count: int
    protocol: str
    file: str
    sha256: str

    def comparable(self, other: "Kept") -> bool:
        """Whether both distances are of equally many images of one protocol."""
        return (self.metric, self.count, self.protocol) == (other.metric, other.count, other.protocol)


class Best:
    """Scores students on the first `config.keep_best` images of the teacher's protocol, and keeps the best in a folder.

    An image's class and noise are the protocol's own: the distance is that of an export with as many images.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher, rows: int):
        """`rows` pictures are made at once. Raises ValueError where there is no protocol, or not for so many images."""
        name = teacher.facts.protocol
        if name is None or config.only is not None:
            what = "one of several students has no protocol" if name else f"the teacher {config.teacher} has no protocol"
            teachers = "a single student of a teacher with one" if name else f"a teacher with one of {', '.join(PROTOCOLS)}"
            raise ValueError(f"{what} to find the best checkpoint by: leave --keep-best out, or train {teachers}")
        self.protocol, self.count = protocol_of(name), config.keep_best
        if not 2 <= self.count <= self.protocol.count:
            raise ValueError(
                f"keep_best {self.count} is not possible: {name} takes 2 to {self.protocol.count} images; type for example "
                f"--keep-best {min(1000, self.protocol.count)}, or 0 to keep no best checkpoint"
            )
        self.metric = self.protocol.metric + ("" if self.count == self.protocol.count else "_proxy")
        self.teacher, self.rows, self.folder = teacher, rows, config.folder / "checkpoints" / "best"
        self.tools = self.protocol.instruments(None, None, teacher.device)

    def distance(self, student: Generator) -> float:
        """The Fréchet distance of the student's images to the protocol's real ones; lower is better."""
        conditions = [i % self.protocol.classes for i in range(self.count)]
        fake, _ = score(self._images(student, conditions), conditions, self.tools.network, self.protocol)
        return frechet_distance(fake, self.tools.real)

    @torch.no_grad()
    def _images(self, student: Generator, conditions: list[int]) -> Iterator[Tensor]:
        teacher, first = self.teacher, self.protocol.first_seed
        for start in range(0, self.count, self.rows):
            part = range(start, min(self.count, start + self.rows))
            sources = [torch.Generator().manual_seed(first + i) for i in part]
            z, *noises = (
                torch.cat([torch.randn(1, *teacher.shape, generator=source) for source in sources]).to(teacher.device)
                for _ in range(student.draws)
            )
            cond, _ = teacher.encode(torch.tensor([conditions[i] for i in part], device=teacher.device))
            yield teacher.to_images(student(z, cond, noises)).float().cpu()

    def offer(self, step: int, student: Generator) -> dict[str, float]:
        """Score the student of a step, and keep it where it is better than the one before. Returns the distance by name.

        One that was kept for another number of images, or another protocol, is replaced: the two cannot be compared.
        """
        value, file = self.distance(student), f"average-{step:08d}.safetensors"
        offered = Kept(step, self.metric, value, self.count, self.protocol.name, file, "")
        kept = kept_in(self.folder)
        if kept is None or not kept.comparable(offered) or value < kept.value:
            self._keep(offered, student)
        return {self.metric: value}

    def _keep(self, offered: Kept, student: Generator) -> None:
        """Write the student, then state.json that names its file, and only then remove the one before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / offered.file
        with replaced(path) as partial:
            save_tensors(unwrap(student.denoiser.network).state_dict(), partial)
        with replaced(self.folder / STATE) as partial:
            partial.write_text(json.dumps(asdict(offered) | {"sha256": sha256_of(path)}, indent=1) + "\n")
            fsync(partial)
        fsync(self.folder)
        for old in self.folder.iterdir():
            if old.name not in (offered.file, STATE):
                old.unlink()


def kept_in(folder: Path) -> Kept | None:
    """What a folder `checkpoints/best` says it holds; None where there is none. Raises ValueError where it is damaged."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        kept = Kept(**json.loads(path.read_text()))
        if any(type(vars(kept)[each.name]) is not each.type for each in fields(kept)) or Path(kept.file).name != kept.file:
            raise ValueError(f"{STATE} has changed since it was written")
        return kept
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from error


def read_best(run: Path) -> tuple[Kept, dict[str, Tensor]]:
    """The best student of a run, and its weights. Raises ValueError where there is none, or where it is damaged."""
    folder = run / "checkpoints" / "best"
    kept = kept_in(folder)
    if kept is None:
        raise ValueError(f"{run} keeps no best checkpoint: train it with --keep-best 1000, or leave --best out")
    try:
        if sha256_of(folder / kept.file) != kept.sha256:
            raise ValueError(f"{kept.file} has changed since it was written")
        return kept, load_file(folder / kept.file)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"the best checkpoint {folder} cannot be used: {reason}. Delete that folder, and export without --best"
    )
