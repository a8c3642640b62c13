"""Many students of one teacher: each has a part of its conditions, and only one runs for a picture.

Multi-Student Distillation (Song et al. 2024): G_k = distil(teacher, conditions and real data of part k), by any method, for
k = 0 .. K-1. The runs know nothing of each other. Pairs of noise and teacher sample are those of all conditions for every
student: a student that regresses on its own part's alone is the worse for it (figure 8 there).

The exports of all students make one folder, which a plain diffusers pipeline reads, without onestep.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor

from .config import PROG, TrainConfig
from .data import Data
from .data.shards import Rows, Shards
from .exporting import replacing
from .objectives import Batch
from .partition import PARTITION_NAME, Classes, Partition, Prompts, partition_of, pooled, read_partition
from .quiet import quiet
from .rng import Rng
from .saved import saved_options
from .teacher import Teacher
from .teacher.text import EXAMPLES, TextTeacher

CLASS = "MultiStudentPipeline"
SOURCE = Path(__file__).parent / "pipelines" / "multi_student.py"


class Some(Shards):
    """Some rows of shards, in the order of `kept`."""

    def __init__(self, shards: Shards, kept: Tensor):
        self.shards, self.kept = shards, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Tensor) -> Rows:
        return self.shards[self.kept[index.to(self.kept.device)]]


class Part(Data):
    """The data of one student: its conditions alone, and the real samples that have them."""

    def __init__(self, data: Data, partition: Partition, number: int, assigned: Tensor):
        """`assigned`, shape (classes,), is the student of each condition. Raises ValueError where none has real samples."""
        own = (assigned == number).nonzero()[:, 0]
        real, conditions = data.real, data.conditions
        if real is not None and conditions is not None:
            kept = (assigned.to(conditions.device)[conditions] == number).nonzero()[:, 0]
            if len(kept) == 0:
                raise ValueError(f"the data have no sample of student {number}'s conditions; type --data with other data")
            real, conditions = Some(real, kept) if isinstance(real, Shards) else real[kept], conditions[kept]
        note = f"student {number}: {len(own):,} of {data.classes:,} conditions"
        super().__init__(real, conditions, data.classes, data.seed, f"{data.note}\n{note}".strip())
        self.partition, self.own = partition, own

    def batch(self, step: int, total: int, start: int, stop: int, device: torch.device | str) -> Batch:
        if self.real is not None:
            return super().batch(step, total, start, stop, device)
        self.own = self.own.to(device)
        rng = Rng(self.seed, step, total, start, stop, device)
        return Batch(self.own[rng.integers(len(self.own))], None, rng)


def restricted(config: TrainConfig, teacher: Teacher, data: Data) -> Data:
    """The data of the student that `config.only` names; all of them where it names none."""
    if config.only is None:
        return data
    partition = partition_of(teacher, config.students, config.part_list)
    return Part(data, partition, config.only, partition.assigned(teacher))


# ---- side by side


def devices() -> list[str]:
    """The accelerators that this process could give to one student each; none where there is one, or a launcher's."""
    count = 0 if "WORLD_SIZE" in os.environ else torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(index) for index in range(count)]) if count > 1 else []


def side_by_side(commands: Sequence[Sequence[str]], places: Sequence[str], logs: Sequence[Path]) -> list[int]:
    """Run each command on one of `places` (CUDA_VISIBLE_DEVICES), one at a time on each; returns their exit codes.

    SIGINT and SIGTERM are handed to those that run, which save and stop, and KeyboardInterrupt is raised.
    """
    waiting, free = list(range(len(commands))), list(places)
    running: dict[int, tuple[subprocess.Popen[bytes], str]] = {}
    codes = [0] * len(commands)

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            while waiting and free:
                number, place = waiting.pop(0), free.pop(0)
                logs[number].parent.mkdir(parents=True, exist_ok=True)
                with logs[number].open("ab") as log:
                    running[number] = (
                        subprocess.Popen(
                            commands[number],
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env={**os.environ, "CUDA_VISIBLE_DEVICES": place},
                            start_new_session=True,  # a terminal's Ctrl-C is this process's, to be handed on once
                        ),
                        place,
                    )
            for number, (process, place) in list(running.items()):
                code = process.poll()
                if code is not None:
                    codes[number] = code
                    del running[number]
                    free.append(place)
            time.sleep(0.05)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return codes


def train_side_by_side(config: TrainConfig, argv: Sequence[str], places: Sequence[str]) -> bool:
    """Every student in a process of its own, its output in a file beside its folder; whether all came to their end.

    Raises ValueError where one fails.
    """
    numbers = range(config.students)
    commands = [[sys.executable, "-m", "onestep.train", *argv, "--only", str(number)] for number in numbers]
    logs = [config.group / f"student-{number}.log" for number in numbers]
    codes = side_by_side(commands, places, logs)
    failed = [number for number, code in zip(numbers, codes) if code]
    if failed:
        raise ValueError(
            f"of the students {failed} failed: see {logs[failed[0]]}. The same command goes on with those that are not done"
        )
    return all((config.group / f"student-{number}" / "export").is_dir() for number in numbers)


# ---- one folder of all


def assemble(run: Path, folder: Path | None = None) -> str:
    """One folder of the exports of all students in `run`, by default RUN/export; returns its path and how it is used.

    Each student's subfolder is its own stock folder; files are linked where the disk can, else copied. Raises ValueError
    for a folder without a partition, with students that are not exported yet, or with a router that decides otherwise than
    the training did.
    """
    partition = read_partition(run / PARTITION_NAME)
    numbers = range(partition.students)
    exports = [run / f"student-{number}" / "export" for number in numbers]
    missing = [number for number, export in zip(numbers, exports) if not (export / "model_index.json").is_file()]
    if missing:
        raise ValueError(
            f"{run} lacks the exports of students {missing}; type {PROG} --config {run}/student-K/config.yaml for each, or "
            "the command of all of them again"
        )
    if not SOURCE.is_file():
        raise ValueError(f"{SOURCE} is missing: run this from a checkout of the repository")
    config, _ = saved_options(exports[0].parent)
    from .run import DTYPES, loaded

    teacher = loaded(config, "cpu")
    target, dtype = folder or run / "export", str(DTYPES[config.export_dtype]).removeprefix("torch.")
    with replacing(target) as scratch:
        for number, export in zip(numbers, exports):
            shutil.copytree(export, scratch / f"student-{number}", copy_function=link_or_copy)
        shutil.copy(run / PARTITION_NAME, scratch)
        shutil.copy(SOURCE, scratch / SOURCE.name)
        index = index_of(partition, teacher, scratch, dtype, config.student_steps)
        (scratch / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (scratch / "README.md").write_text(card(config, teacher, partition, target.resolve().name), encoding="utf-8")
        check_router(scratch, partition, teacher)
    return f"students: {target}\n\nUse them:\n\n{snippet(partition, target)}"


def link_or_copy(source: str, target: str) -> str:
    """The same file under another name, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def index_of(partition: Partition, teacher: Teacher, folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    """model_index.json of all students: which class reads it, what they are called with, and hashes of their weights."""
    from diffusers import __version__

    from .metrics.provenance import sha256_of_weights

    called = {
        key: value for key, value in teacher.arguments([]).items() if key not in ("prompt", "class_labels", "batch_size")
    }
    names = [f"student-{number}" for number in range(partition.students)]
    hashes = {name: sha256_of_weights(folder / name / teacher.network_name) for name in names}
    return {
        "_class_name": [SOURCE.stem, CLASS],
        "_diffusers_version": __version__,
        "students": partition.students,
        "dtype": dtype,
        "defaults": called | {"num_inference_steps": steps},
        "sha256": {"partition": partition.content["sha256"], **hashes},
    }


def plain_pipeline(folder: Path) -> Any:
    """The folder as any user of diffusers loads it; its students are loaded when they are asked for."""
    from diffusers import DiffusionPipeline

    with quiet():
        return DiffusionPipeline.from_pretrained(
            str(folder), custom_pipeline=SOURCE.stem, trust_remote_code=True, local_files_only=True
        )


def check_router(folder: Path, partition: Partition, teacher: Teacher) -> None:
    """Raises ValueError where the pipeline sends a class, or an example prompt, to another student than the partition."""
    pipeline = plain_pipeline(folder)
    with quiet():
        if isinstance(partition, Classes):
            labels = list(range(teacher.classes))
            same = pipeline.route(labels) == partition.route(labels)
        else:
            assert isinstance(partition, Prompts) and isinstance(teacher, TextTeacher)
            same = pipeline.route(EXAMPLES) == partition.route(pooled(teacher.embed(EXAMPLES))).tolist()
    if not same:
        raise ValueError(
            "the router of the exported folder decides otherwise than the training did; type --export-dtype fp32, in which "
            "prompts are embedded as in training"
        )


def snippet(partition: Partition, folder: str | Path) -> str:
    """Five lines of Python that load the students, make pictures and save one of them."""
    example = list(range(min(4, len(partition.student)))) if isinstance(partition, Classes) else EXAMPLES
    wanted = f"{'class_labels' if isinstance(partition, Classes) else 'prompt'}={example}"
    name = json.dumps(str(folder))
    return "\n".join(
        (
            "import torch",
            "from diffusers import DiffusionPipeline",
            f"pipe = DiffusionPipeline.from_pretrained({name}, custom_pipeline={SOURCE.stem!r}, trust_remote_code=True)",
            f"images = pipe({wanted}, generator=torch.Generator().manual_seed(0)).images",
            'images[0].save("picture.png")',
        )
    )


def card(config: TrainConfig, teacher: Teacher, partition: Partition, name: str) -> str:
    """README.md of the folder of all students."""
    front = {"license": "other", "license_name": teacher.facts.licence, "library_name": "diffusers", "tags": [config.method]}
    numbers = range(partition.students)
    lines = "\n".join(
        f"| [student-{number}](student-{number}/README.md) | {_share(partition, number)} |" for number in numbers
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

{config.teacher}, distilled with {config.method} into {partition.students} students that share its conditions: a picture
costs {config.student_steps} network call{"s" * (config.student_steps > 1)} of the one student that knows its condition.

```python
{snippet(partition, name)}
```

| student | conditions |
|---|---|
{lines}

Each subfolder is a stock {type(teacher.pipeline).__name__} of its own. Students are loaded when they are first needed.
"""


def _share(partition: Partition, number: int) -> str:
    if isinstance(partition, Classes):
        return "classes " + ", ".join(map(str, partition.parts[number]))
    return "prompts that partition.json sends to it"
