"""A partition of a teacher's conditions among several students, and the rule by which each condition finds its own.

Classes are divided in the order of their numbers. Prompts are divided by their embeddings: a tree of cuts, each at the
median (or another quantile, where the students are no power of two) along one of the directions in which the embeddings
vary most. Both give parts of equal size, to within one (Multi-Student Distillation, Song et al. 2024, section 4.2).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .data.shards import locked, write_json
from .denoiser import Cond
from .teacher import Teacher

PARTITION_NAME = "partition.json"
CHUNK = 256
"""Prompts whose embeddings are read at once."""
POOLED = ("text_embeds", "pooled_projections")
"""Names of a prompt's embedding as one vector, among what networks are conditioned on."""


class Partition(ABC):
    """Which of `students` students a condition belongs to: 0 .. students - 1."""

    kind: ClassVar[str]
    """What a condition is, as `Teacher.conditioned_by` says it."""

    def __init__(self, students: int, conditions: str):
        """`conditions` is a hash of what was divided."""
        self.students, self.conditions = students, conditions

    @abstractmethod
    def assigned(self, teacher: Teacher) -> Tensor:
        """The student of each of the teacher's conditions, shape (classes,)."""

    @abstractmethod
    def rule(self) -> dict[str, Any]:
        """What `route` needs, JSON-able."""

    @property
    def content(self) -> dict[str, Any]:
        """Everything, as it is saved: with a hash over all the rest."""
        about = {"kind": self.kind, "students": self.students, "conditions": self.conditions, **self.rule()}
        return about | {"sha256": digest(about)}

    def keep(self, folder: Path) -> Path:
        """Save it there, where it is not yet; of several runs that start at once the first one does.

        Raises ValueError where another partition is there.
        """
        path = folder / PARTITION_NAME
        with locked(folder, f".{PARTITION_NAME}.lock"):
            if not path.is_file():
                write_json(path, self.content)
        if read_partition(path).content != self.content:
            raise ValueError(
                f"{folder} holds students of another partition, of other conditions or another number of them; "
                "type --output with another folder"
            )
        return path


class Classes(Partition):
    """Class labels; parts[k] are those of student k."""

    kind = "class"

    def __init__(self, parts: Sequence[Sequence[int]], conditions: str):
        super().__init__(len(parts), conditions)
        self.parts = [list(part) for part in parts]
        self.student = {label: k for k, part in enumerate(self.parts) for label in part}

    def rule(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def route(self, labels: Iterable[int]) -> list[int]:
        """The student of each label. Raises ValueError for one that is in no part."""
        return [self.student_of(label) for label in labels]

    def student_of(self, label: int) -> int:
        if label not in self.student:
            raise ValueError(f"the class {label} is in no part; allowed are 0 .. {len(self.student) - 1}")
        return self.student[label]

    def assigned(self, teacher: Teacher) -> Tensor:
        return torch.tensor(self.route(range(teacher.classes)))


class Prompts(Partition):
    """Embeddings v: at a node of the tree to "low" where direction . v <= cut, else to "high", down to a student's number.

    `directions` has shape (depth, dimensions), in float64.
    """

    kind = "text"

    def __init__(self, tree: Any, directions: Tensor, students: int, conditions: str):
        super().__init__(students, conditions)
        self.tree, self.directions = tree, directions.double().cpu()

    def rule(self) -> dict[str, Any]:
        return {"directions": self.directions.tolist(), "tree": self.tree}

    def route(self, vectors: Tensor) -> Tensor:
        """The student of each embedding of shape (N, dimensions), see `pooled`; shape (N,)."""
        return walk(self.tree, vectors.double().cpu() @ self.directions.T)

    def assigned(self, teacher: Teacher) -> Tensor:
        return torch.cat([self.route(chunk) for chunk in vectors_of(teacher)])


def read_partition(path: Path) -> Partition:
    """What `Partition.keep` wrote. Raises ValueError where it is missing or has changed since."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = content["sha256"] == digest({key: value for key, value in content.items() if key != "sha256"})
        made = _made(content)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); train the students again in another --output") from error
    if not whole:
        raise ValueError(f"{path} has changed since it was written; train the students again in another --output")
    return made


def _made(content: dict[str, Any]) -> Partition:
    if content["kind"] == Classes.kind:
        return Classes(content["parts"], content["conditions"])
    directions = torch.tensor(content["directions"], dtype=torch.float64)
    return Prompts(content["tree"], directions, content["students"], content["conditions"])


def partition_of(teacher: Teacher, students: int, parts: Sequence[Sequence[int]] | None = None) -> Partition:
    """The teacher's conditions among `students`; `parts` gives each its classes, by default consecutive ones.

    The same for the same teacher, conditions and number. Raises ValueError for more students than conditions, and for
    `parts` that are no partition of them.
    """
    count = teacher.classes
    conditions = digest(teacher.named(list(range(count))))
    if students > count:
        raise ValueError(
            f"{students} students cannot share {count} condition{'s' * (count > 1)}: each needs one of its own; "
            f"type --students {count} or fewer"
        )
    if teacher.conditioned_by == Prompts.kind:
        if parts is not None:
            raise ValueError("--parts divides classes, and this teacher is conditioned on text: leave it out")
        return _by_embeddings(teacher, students, conditions)
    if parts is not None and sorted(label for part in parts for label in part) != list(range(count)):
        raise ValueError(
            f"the parts {parts} are no partition of the classes 0 .. {count - 1}: name each in exactly one part"
        )
    if parts is not None and (len(parts) != students or not all(parts)):
        raise ValueError(f"the parts {parts} are not those of {students} students; type --students {len(parts)}")
    sizes = balanced(count, students)
    ends = [sum(sizes[: k + 1]) for k in range(students)]
    return Classes(parts or [range(end - size, end) for size, end in zip(sizes, ends)], conditions)


def _by_embeddings(teacher: Teacher, students: int, conditions: str) -> Prompts:
    depth = (students - 1).bit_length()
    directions = principal_directions(lambda: vectors_of(teacher), depth)
    projections = torch.cat([chunk.double() @ directions.T for chunk in vectors_of(teacher)])
    return Prompts(grow(projections, students), directions, students, conditions)


def grow(projections: Tensor, students: int, first: int = 0, depth: int = 0) -> Any:
    """The tree of cuts that gives `students` students, from number `first` on, equal shares of projections (N, depth).

    Halves the students along one direction, and each half along the next. Raises ValueError where equal projections
    leave a student without any.
    """
    if students == 1:
        return first
    low = students // 2
    count = sum(balanced(len(projections), students)[:low])
    values = projections[:, depth].sort().values
    if count == 0 or values[0] == values[-1]:
        raise ValueError("the prompts are too alike to be divided; type --data with more of them, or fewer --students")
    cut = float((values[count - 1] + values[count]) / 2)
    if cut >= values[-1]:  # equal ones at the upper end: they stay together
        cut = float(values[values < values[-1]][-1] + values[-1]) / 2
    below = projections[:, depth] <= cut
    return {
        "direction": depth,
        "cut": cut,
        "low": grow(projections[below], low, first, depth + 1),
        "high": grow(projections[~below], students - low, first + low, depth + 1),
    }


def walk(tree: Any, projections: Tensor) -> Tensor:
    """The student at the end of the way of each row of projections (N, depth), shape (N,)."""
    if isinstance(tree, int):
        return torch.full((len(projections),), tree)
    below = projections[:, tree["direction"]] <= tree["cut"]
    return torch.where(below, walk(tree["low"], projections), walk(tree["high"], projections))


def principal_directions(chunks: Callable[[], Iterator[Tensor]], count: int) -> Tensor:
    """The `count` unit vectors along which the rows of all chunks vary most, shape (count, dimensions), in float64.

    Of each the largest entry is positive, so that they do not depend on a library's choice of sign.
    """
    total, first, second = 0, torch.zeros(()), torch.zeros(())
    for chunk in chunks():
        rows = chunk.double()
        total, first, second = total + len(rows), first + rows.sum(0), second + rows.T @ rows
    mean = first / total
    _, vectors = torch.linalg.eigh(second / total - torch.outer(mean, mean))
    found = vectors.T.flip(0)[:count]
    if len(found) < count:
        raise ValueError(f"embeddings of {len(vectors)} dimensions have no {count} directions; type fewer --students")
    return found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()


def vectors_of(teacher: Teacher) -> Iterator[Tensor]:
    """The embedding of every prompt of the teacher's table, in chunks (<= CHUNK, dimensions) on the CPU."""
    for start in range(0, teacher.classes, CHUNK):
        cond, _ = teacher.encode(torch.arange(start, min(start + CHUNK, teacher.classes)))
        yield pooled(cond).cpu()


def pooled(cond: Cond) -> Tensor:
    """One vector a prompt, (N, dimensions): the pooled embedding where the network is given one, else its tokens' mean.

    Tokens behind a mask do not count.
    """
    for name in POOLED:
        if name in cond:
            return cond[name].double()
    tokens = cond["encoder_hidden_states"].double()
    mask = cond.get("encoder_attention_mask")
    if mask is None:
        return tokens.mean(1)
    weight = mask.to(tokens)[..., None]
    return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)


def balanced(count: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `count` things, which differ by one at most."""
    return [count // parts + (k < count % parts) for k in range(parts)]


def digest(about: Any) -> str:
    """A hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
