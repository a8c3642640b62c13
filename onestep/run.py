"""A run from its options: the teacher, student and objective they describe, and what is made of them at the end."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .best import read_best
from .card import Card, asked_guidance, lora_snippet, snippet, update_score
from .checking import require_prediction, samples
from .checkpoint import latest_checkpoint, read_weights
from .config import CONFIG_NAME, PROG, TrainConfig, flat
from .data import Data
from .denoiser import body
from .exporting import export, export_lora
from .files import replaced
from .generator import Generator, steps_from
from .guided_export import export_guided
from .guided_sampler import GuidedSampler
from .guided_strength import Strength, matched_strength, set_strength
from .multi_student import restricted
from .objectives import objective_class
from .pipelines.adapter_guidance import SUBFOLDER
from .saved import RESULTS_NAME, STRENGTH_NAME, saved_options
from .second_time import WEIGHT
from .smaller import smaller
from .teacher import Copies, Teacher, load_teacher
from .trainer import Trainer, accelerator_of, rows_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INPUTS = (WEIGHT, "time_embedding.cond_proj.weight")
"""Ends of the names of weights that start at zero where a method gives a network an input."""


def guidance_of(config: TrainConfig, teacher: Teacher) -> float:
    """The guidance put on the teacher: the option, or the teacher's own."""
    return teacher.facts.guidance if config.guidance is None else config.guidance


def loaded(config: TrainConfig, device: torch.device | str) -> Teacher:
    """The teacher that a run asks for. Raises ValueError where it cannot be had."""
    teacher = load_teacher(config.teacher, device, DTYPES[config.weights], config.resolution, config.cache_folder)
    if config.attention == "xformers":
        use_xformers(teacher)
    teacher.copies = copies_of(config)
    return teacher


def copies_of(config: TrainConfig) -> Copies:
    """How copies of the teacher's network are made: which players are adapters, of what size, and what is recomputed."""
    players = {"student": config.student, "critic": config.critic}
    lora = frozenset(player for player, kind in players.items() if kind == "lora")
    return Copies(lora, config.rank, config.targets, config.gradient_checkpointing)


def use_xformers(teacher: Teacher) -> None:
    """Attention by xformers. Raises ValueError where it cannot be had."""
    network: Any = teacher.denoiser.network
    try:
        network.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise ValueError(
            f"xformers cannot be used: {' '.join(str(error).split())}. Type pip install 'onestep-diffusion[xformers]' on a "
            "machine with CUDA, or leave --attention out"
        ) from error


def new_student(config: TrainConfig, options: Any, teacher: Teacher) -> Generator:
    """What the method makes of the teacher itself, else a copy, or a smaller network, that starts at sigma/alpha = init_rho.

    Raises ValueError for options that do not fit the method or the teacher.
    """
    method, small = objective_class(config.method), config.student_blocks is not None or config.student_width != 1
    generator = method.student(options, teacher, config.student_steps)
    if generator is None:
        denoiser = smaller(teacher, config.student_blocks, config.student_width) if small else teacher.copy("student")
        generator = Generator(denoiser, steps_from(denoiser.schedule, config.init_rho, config.student_steps))
    elif small:
        raise ValueError(f"{config.method} trains the teacher's own network: leave --student-blocks and --student-width out")
    method.prepare(options, generator)
    return generator


def make_student(config: TrainConfig, options: Any, teacher: Teacher) -> Generator:
    """A new student with the weights of `init`, if there is one, and noise of the size that its export is given.

    Raises ValueError for options, or weights, that do not fit the method or the teacher.
    """
    generator = new_student(config, options, teacher)
    denoiser = generator.denoiser
    if config.init:
        start_from(init_of(config.init, config.only), denoiser.network, teacher.network_name)
    scale = teacher.export_scale if config.input_scale == "auto" else config.input_scale
    if scale == "sigma":
        probe = torch.zeros(1, dtype=torch.float64)
        generator.input_scale = float(denoiser.schedule(generator.time(0, probe), probe)[1])
    return generator


def init_of(init: str, only: int | None) -> Path:
    """Where a student starts from: in a run of several, from the student of its own number."""
    own = Path(init) / f"student-{only}"
    return own if only is not None and own.is_dir() else Path(init)


def start_from(source: Path, network: Any, name: str) -> None:
    """Load a network's weights from a run's averaged student, or from the subfolder `name` of a diffusers folder.

    Raises ValueError where there is neither, or where they do not fit.
    """
    checkpoint = latest_checkpoint(source / "checkpoints", "average")
    try:
        if checkpoint is not None:
            weights = read_weights(checkpoint, "average")
        elif (source / name).is_dir() and not hasattr(type(network), "from_pretrained"):
            raise ValueError(
                f"{source} has the weights of a whole {name}, and this student is adapters on the teacher's own: type "
                "--init with the folder of a run that trained such adapters, or leave it out"
            )
        elif (source / name).is_dir():
            weights = type(network).from_pretrained(source / name).state_dict()
        else:
            raise ValueError(
                f"{source} is no run and no diffusers folder with a {name}; type --init with the folder of a run of "
                "onestep.train or of an export"
            )
        kept = {key: value for key, value in network.state_dict().items() if key.endswith(INPUTS)}  # may be new
        network.load_state_dict(kept | weights, strict=True)
    except (RuntimeError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the weights in {source} do not fit the teacher's {name}: {reason}. Type {_instead(source, network, name)}"
        ) from error


def _instead(source: Path, network: Any, name: str) -> str:
    """What to type where the weights of a run, or a folder, are no start for this network."""
    exported = source / "export"
    if (exported / SUBFOLDER).is_dir():
        return f"--teacher {exported}, which is guided by the adapters of that run"
    checkpoint = latest_checkpoint(source / "checkpoints", "average")
    if checkpoint is not None and (exported / name).is_dir():
        more = read_weights(checkpoint, "average").keys() - network.state_dict().keys()
        if more and all(key.endswith(INPUTS) for key in more):
            return f"--init {exported}, which has not the inputs of that run's method"
    return "another --init"


def make_trainer(config: TrainConfig, options: Any) -> Trainer:
    """Everything a run trains; caches are kept in `config.cache_folder`.

    Raises ValueError for options that do not fit the teacher, its data or the number of processes.
    """
    accelerator = accelerator_of(config)
    rows_of(config, accelerator.num_processes)
    teacher = loaded(config, accelerator.device)
    generator = make_student(config, options, teacher)
    method = objective_class(config.method)
    data = Data.of(config.data, teacher, config.seed, config.cache_folder, method.uses_real(options))
    data = restricted(config, teacher, data)
    if data.note and accelerator.is_main_process:
        print(data.note)
    if data.real is not None:
        require_prediction(teacher, samples(data, teacher))
    torch.manual_seed(config.seed)  # of the networks that start from scratch
    with accelerator.main_process_first():  # one process fills the cache, the others find it
        guidance = guidance_of(config, teacher)
        objective = method(options, teacher, generator, guidance, config.cache_folder, config.folder)
    if config.iterations <= objective.settled:
        raise ValueError(
            f"iterations {config.iterations} end before the last stage of {config.method}, which begins at step "
            f"{objective.settled}; type more, for example --iterations {2 * objective.settled}, or shorter stages "
            "(--backtrack, --segment-steps, --reflow-steps: whichever it has)"
        )
    if config.offload and body(generator.denoiser.network) is teacher.denoiser.network:
        raise ValueError(f"--offload moves away the weights that {config.method} works on: leave it out")
    if config.offload:
        teacher.offload()
    teacher.rest()  # its caches are written
    return Trainer(config, teacher, generator, objective, data, config.folder)


def card_of(config: TrainConfig, options: Any, teacher: Teacher) -> Card:
    """The model card's facts, without a score."""
    return Card(
        method=config.method,
        teacher=config.teacher,
        guidance=objective_class(config.method).ends_at(options, guidance_of(config, teacher)),
        licence=teacher.facts.licence,
        config=flat(config, options),
        score=None,
        command=f"{PROG} --config {shlex.quote(str(config.folder / CONFIG_NAME))}",
    )


def export_run(
    run: Path,
    folder: Path | None = None,
    dtype: str | None = None,
    lora: str | None = None,
    steps: int | None = None,
    best: bool = False,
) -> str:
    """Export the averaged student of a run's newest checkpoint; the defaults are the run's own. Returns the snippet.

    `best` exports that of the best checkpoint, which --keep-best has kept. `lora` names the layout of a LoRA file to write
    instead of a full model. `steps` are the student's network calls, at the times that `steps_from` has for them: the
    weights are the same.

    Raises ValueError where the folder holds no run, or a run without a sound checkpoint.
    """
    assert steps is None or steps >= 1
    config, options = saved_options(run)
    weights = read_best(run)[1] if best else newest_average(run)
    teacher = loaded(config, "cpu")
    asked = replace(config, init=None, student_steps=steps or config.student_steps)
    generator = make_student(asked, options, teacher)
    generator.denoiser.network.load_state_dict(weights, strict=True)
    target, kind = folder or run / export_name(steps, lora is not None, best), DTYPES[dtype or config.export_dtype]
    if lora:
        export_lora(generator, teacher, target, lora, kind)
        return lora_snippet(teacher, target, generator)
    card = card_of(config, options, teacher)
    if isinstance(generator, GuidedSampler):
        if (run / STRENGTH_NAME).is_file():
            kept = json.loads((run / STRENGTH_NAME).read_text())
            set_strength(generator, Strength(kept["strength"], kept.get("tilt", 0.0)))
        return export_guided(generator, teacher, target, kind, card)
    export(generator, teacher, target, kind, card)
    _repeat_score(run, target / teacher.network_name, len(generator.times))
    return snippet(teacher, target, len(generator.times), kind, asked_guidance(generator, card.guidance))


def newest_average(run: Path) -> dict[str, Tensor]:
    """The averaged student's weights in a run's newest checkpoint. Raises ValueError where there is no sound one."""
    checkpoint = latest_checkpoint(run / "checkpoints", "average")
    if checkpoint is None:
        source = shlex.quote(str(run / CONFIG_NAME))
        raise ValueError(f"{run} holds no checkpoint yet; type {PROG} --config {source} first")
    return read_weights(checkpoint, "average")


def export_name(steps: int | None, lora: bool = False, best: bool = False) -> str:
    """Name of an export's folder in its run's: that with the run's own number of steps, or that with `steps`."""
    return ("lora" if lora else "export") + ("-best" if best else "") + (f"-{steps}" if steps else "")


def _repeat_score(run: Path, network: Path, steps: int) -> None:
    """Put the run's own score into the card of an export with the very weights and steps that were scored."""
    from .metrics.provenance import sha256_of_weights

    if (run / RESULTS_NAME).is_file():
        row = json.loads((run / RESULTS_NAME).read_text())
        if row["weights_sha256"] == sha256_of_weights(network) and row.get("steps", steps) == steps:
            update_score(network.parent, row)


def finish(trainer: Trainer, options: Any) -> None:
    """Export, score by the teacher's protocol, and print where everything is and how to use it; for one process."""
    config, teacher, folder = trainer.config, trainer.teacher, trainer.folder
    picture, target, dtype = folder / "grid.png", folder / "export", DTYPES[config.export_dtype]
    generator, card = trainer.averaged(), card_of(config, options, teacher)
    if isinstance(generator, GuidedSampler):
        _calibrate(generator, trainer, options.calibrate, options.calibrate_to)
    trainer.draw(picture)
    if isinstance(generator, GuidedSampler):
        code = export_guided(generator, teacher, target, dtype, card)
        print("\n".join([f"picture: {picture}", f"export:  {target}", "", "Use it:", "", code]))
        return
    export(generator, teacher, target, dtype, card)
    lines = [f"picture: {picture}", f"export:  {target}"]
    if config.evaluate and teacher.facts.protocol and config.only is None:  # a protocol asks for all classes
        lines.append(_score(target, trainer, len(generator.times)))
    if trainer.best is not None:
        lines.append(_best(trainer))
    code = snippet(teacher, target, len(generator.times), dtype, asked_guidance(generator, card.guidance))
    print("\n".join([*lines, "", "Use it:", "", code]))


def _calibrate(generator: GuidedSampler, trainer: Trainer, count: int, to: str) -> None:
    """Set the strength of the adapters by so many samples, 0 leaves it, and keep it for later exports of the run."""
    strength = matched_strength(generator, trainer.teacher, count, to) if count else Strength()
    set_strength(generator, strength)
    with replaced(trainer.folder / STRENGTH_NAME) as partial:
        partial.write_text(json.dumps(strength._asdict() | {"samples": count, "to": to}) + "\n")
    if count:
        low, high = strength.ends
        print(f"strength of the adapters: {low:.3f} to {high:.3f} from the least to the most guidance, by {count} samples")


def _best(trainer: Trainer) -> str:
    kept, _ = read_best(trainer.folder)
    how = f"python -m onestep.export {shlex.quote(str(trainer.folder))} --best"
    return f"best:    step {kept.step}, {kept.metric} {kept.value:.2f} of {kept.count} images; export it with {how}"


def _score(target: Path, trainer: Trainer, steps: int) -> str:
    from .metrics import evaluate

    teacher = trainer.teacher
    assert teacher.facts.protocol is not None
    row = evaluate(target, teacher.facts.protocol, steps=steps, guidance=1.0, device=trainer.accelerator.device)
    update_score(target, row)
    (trainer.folder / RESULTS_NAME).write_text(json.dumps(row) + "\n")
    metric = row["protocol"]["metric"]
    return f"score:   {metric} {row[metric]:.2f}, class accuracy {row['class_accuracy']:.1%} ({row['protocol']['name']})"
