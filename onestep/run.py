"""A run from its options: the teacher, student and objective they describe, and what is made of them at the end."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from .card import Card, snippet, update_score
from .checkpoint import latest_checkpoint, read_weights
from .config import CONFIG_NAME, PROG, TrainConfig, flat, load_config, resolve
from .data import Data
from .export import export
from .generator import Generator, steps_from
from .objectives import objective_class
from .teacher import Teacher, facts_of, load_teacher
from .trainer import Trainer, accelerator_of, rows_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RESULTS_NAME = "results.jsonl"


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


def make_trainer(config: TrainConfig, options: Any, cache: Path | None = None) -> Trainer:
    """Everything a run trains; caches are kept in `cache`, by default in the run's folder.

    Raises ValueError for options that do not fit the teacher, its data or the number of processes.
    """
    accelerator = accelerator_of(config)
    rows_of(config, accelerator.num_processes)
    teacher = load_teacher(config.teacher, accelerator.device)
    generator = make_student(config, teacher)
    data = Data.of(config.data, teacher, config.seed)
    torch.manual_seed(config.seed)  # of the networks that start from scratch
    with accelerator.main_process_first():  # one process fills the cache, the others find it
        objective = objective_class(config.method)(
            options, teacher, generator, guidance_of(config, teacher), cache or config.folder / "cache"
        )
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
        command=f"{PROG} --config {shlex.quote(str(config.folder / CONFIG_NAME))}",
    )


def export_run(run: Path, folder: Path | None = None, dtype: str | None = None) -> str:
    """Export the averaged student of a run's newest checkpoint; the defaults are the run's own. Returns the snippet.

    Raises ValueError where the folder holds no run, or a run without a sound checkpoint.
    """
    recipe = load_config(run)
    source = str(run / CONFIG_NAME)
    for key in ("method", "teacher"):
        if not isinstance(recipe.get(key), str):
            raise ValueError(f"{source} names no {key}, so {run} is no run of onestep.train; name the folder of one")
    method_options = objective_class(recipe["method"]).Config
    config, options = resolve(method_options, facts_of(recipe["teacher"]).train, recipe, {}, source)
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run} holds no checkpoint yet; type {PROG} --config {shlex.quote(source)} first")
    teacher = load_teacher(config.teacher)
    generator = make_student(config, teacher)
    generator.denoiser.network.load_state_dict(read_weights(checkpoint, "average"), strict=True)
    target, kind = folder or run / "export", DTYPES[dtype or config.export_dtype]
    export(generator, teacher, target, kind, card_of(config, options, teacher))
    _repeat_score(run, target / teacher.network_name)
    return snippet(teacher, target, len(generator.times), kind)


def _repeat_score(run: Path, network: Path) -> None:
    """Put the run's own score into the card of an export with the very weights that were scored."""
    from .metrics.provenance import sha256_of_weights

    if (run / RESULTS_NAME).is_file():
        row = json.loads((run / RESULTS_NAME).read_text())
        if row["weights_sha256"] == sha256_of_weights(network):
            update_score(network.parent, row)


def finish(trainer: Trainer, options: Any) -> None:
    """Export, score by the teacher's protocol, and print where everything is and how to use it; for one process."""
    config, teacher, folder = trainer.config, trainer.teacher, trainer.folder
    picture, target, dtype = folder / "grid.png", folder / "export", DTYPES[config.export_dtype]
    trainer.draw(picture)
    generator = trainer.averaged()
    export(generator, teacher, target, dtype, card_of(config, options, teacher))
    lines = [f"picture: {picture}", f"export:  {target}"]
    if config.evaluate and teacher.facts.protocol:
        lines.append(_score(target, trainer, len(generator.times)))
    print("\n".join([*lines, "", "Use it:", "", snippet(teacher, target, len(generator.times), dtype)]))


def _score(target: Path, trainer: Trainer, steps: int) -> str:
    from .metrics import evaluate

    teacher = trainer.teacher
    assert teacher.facts.protocol is not None
    row = evaluate(target, teacher.facts.protocol, steps=steps, guidance=1.0, device=trainer.accelerator.device)
    update_score(target, row)
    (trainer.folder / RESULTS_NAME).write_text(json.dumps(row) + "\n")
    metric = row["protocol"]["metric"]
    return f"score:   {metric} {row[metric]:.2f}, class accuracy {row['class_accuracy']:.1%} ({row['protocol']['name']})"
