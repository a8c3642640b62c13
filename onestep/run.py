"""A run from its options: the teacher, student and objective they describe, and what is made of them at the end."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from .checkpoint import latest_checkpoint, read_weights
from .config import TrainConfig, flat, load_config, resolve
from .data import Data
from .export import Card, export, snippet, update_score
from .generator import Generator, steps_from
from .objectives import Objective, objective_class
from .teacher import Teacher, facts_of, load_teacher
from .trainer import Trainer, accelerator_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def guidance_of(config: TrainConfig, teacher: Teacher) -> float:
    """The guidance put on the teacher: the option, or the teacher's own."""
    return teacher.facts.guidance if config.guidance is None else config.guidance


def make_student(config: TrainConfig, teacher: Teacher) -> Generator:
    """A copy of the teacher as a generator that starts at sigma/alpha = init_rho. Raises ValueError for a bad init_rho."""
    denoiser = teacher.copy()
    times = steps_from(denoiser.schedule, config.init_rho, config.student_steps)
    generator = Generator(denoiser, times)
    scale = teacher.export_scale if config.input_scale == "auto" else config.input_scale
    if scale == "sigma":
        probe = torch.zeros(1, dtype=torch.float64)
        generator.input_scale = float(denoiser.schedule(generator.time(0, probe), probe)[1])
    return generator


def make_trainer(config: TrainConfig, options: Any) -> Trainer:
    """Everything a run trains. Raises ValueError for options that do not fit the teacher or its data."""
    device = accelerator_of(config).device
    teacher = load_teacher(config.teacher, device)
    generator = make_student(config, teacher)
    data = Data.of(config.data, teacher, config.seed)
    cls: type[Objective] = objective_class(config.method)
    objective = cls(options, teacher, generator, guidance_of(config, teacher), config.folder / "cache")
    return Trainer(config, teacher, generator, objective, data, config.folder)


def card_of(config: TrainConfig, options: Any, teacher: Teacher) -> Card:
    """The model card's facts, without a score."""
    return Card(
        method=config.method,
        teacher=config.teacher,
        guidance=guidance_of(config, teacher),
        licence=teacher.facts.licence,
        config=flat(config, options),
        score=None,
        command=f"python -m onestep.train --config {config.folder}/config.yaml",
    )


def export_run(run: Path, folder: Path, dtype: str) -> tuple[Path, Teacher, TrainConfig]:
    """Export the averaged student of a run's newest checkpoint. Raises ValueError where there is none."""
    recipe = load_config(run)
    facts = facts_of(str(recipe.get("teacher")))
    cls = objective_class(str(recipe.get("method")))
    config, options = resolve(cls.Config, facts.train, recipe, {}, str(run / "config.yaml"))
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run} holds no checkpoint yet; type python -m onestep.train --config {run}/config.yaml first")
    teacher = load_teacher(config.teacher)
    generator = make_student(config, teacher)
    generator.denoiser.network.load_state_dict(read_weights(checkpoint, "average"), strict=True)
    export(generator, teacher, folder, DTYPES[dtype], card_of(config, options, teacher))
    return folder, teacher, config


def finish(trainer: Trainer, options: Any) -> None:
    """Export, score by the teacher's protocol, and print where everything is and how to use it."""
    config, teacher, folder = trainer.config, trainer.teacher, trainer.folder
    trainer.draw(folder / "grid.png")
    if not trainer.accelerator.is_main_process:
        return
    generator = copy.deepcopy(trainer.averaged())
    target = folder / "export"
    export(generator, teacher, target, DTYPES[config.export_dtype], card_of(config, options, teacher))
    lines = [f"picture: {folder / 'grid.png'}", f"export:  {target}"]
    if config.evaluate and teacher.facts.protocol:
        lines.append(_score(target, trainer, len(generator.times)))
    print("\n".join(lines), "\n\nUse it:\n\n" + snippet(teacher, target, len(generator.times), DTYPES[config.export_dtype]))


def _score(target: Path, trainer: Trainer, steps: int) -> str:
    from .metrics import evaluate

    teacher = trainer.teacher
    assert teacher.facts.protocol is not None
    row = evaluate(target, teacher.facts.protocol, steps=steps, guidance=1.0, device=trainer.accelerator.device)
    update_score(target, row)
    with (trainer.folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    metric = row["protocol"]["metric"]
    return f"score:   {metric} {row[metric]:.2f}, class accuracy {row['class_accuracy']:.1%} ({row['protocol']['name']})"
