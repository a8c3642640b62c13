"""Options of a run, and how they are resolved, saved and compared, without importing torch.

Precedence: a method's DEFAULTS over the dataclass defaults < the teacher's facts < what the method INSISTS on <
`--config recipe.yaml` < flags.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, ClassVar

import yaml

from .options import load_recipe, nearest, option, options_of, shown

__all__ = [
    "CONFIG_NAME",
    "PARTIAL",
    "PROG",
    "MethodConfig",
    "TrainConfig",
    "differences",
    "flat",
    "load_config",
    "load_recipe",
    "option",
    "options_of",
    "resolve",
    "save_config",
]

CONFIG_NAME = "config.yaml"
PARTIAL = "config.yaml.partial"
"""What config.yaml is called while it is written."""
PROG = "python -m onestep.train"


class MethodConfig:
    """Base of the dataclass of a method's own options."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """Options of TrainConfig that the method wants otherwise."""
    INSISTS: ClassVar[Mapping[str, Any]] = {}
    """The same where the method knows better than the teacher's facts; recipes and flags are still obeyed."""

    def __post_init__(self) -> None:
        """Raises ValueError where options do not fit each other; the defaults do."""


@dataclass
class TrainConfig:
    """Options that every method shares."""

    method: str = option("dmd2", "distillation method")
    teacher: str = option("fashion", "known teacher, diffusers folder or hub id")
    init: str | None = option(None, "run or diffusers folder whose network the student starts from; none: the teacher's")
    output: str | None = option(None, "folder of the run; none means runs/<method>-<teacher>")
    data: str | None = option(None, "embedded data by name, a folder, a file or a Hugging Face dataset: see docs/data.md")
    cache: str | None = option(
        None, "folder of caches shared by all runs; none means $ONESTEP_CACHE or ~/.cache/onestep", free=True
    )
    resolution: int | None = option(None, "side of the pictures in pixels; none means the teacher's own", minimum=1)
    seed: int = option(0, "seed of every random draw", minimum=0, below=2**63)
    iterations: int = option(1200, "training steps", minimum=1)
    batch_size: int = option(64, "samples per optimiser step, over all processes and accumulation", minimum=1)
    accumulation: int = option(1, "micro-batches per optimiser step", minimum=1)
    lr: float = option(1e-4, "learning rate of the generator", above=0)
    critic_lr: float = option(1e-4, "learning rate of the other networks", above=0)
    warmup: int = option(50, "steps over which the learning rates rise from zero", minimum=0)
    lr_decay: str = option("cosine", "learning rates after the warmup", choices=("constant", "cosine"))
    weight_decay: float = option(0.0, "decoupled weight decay (AdamW)", minimum=0)
    beta1: float = option(0.0, "Adam's decay of the mean", minimum=0, below=1)
    beta2: float = option(0.99, "Adam's decay of the mean square", minimum=0, below=1)
    clip_norm: float = option(10.0, "largest gradient norm of each optimiser step", above=0)
    ema: float = option(0.99, "decay of the generator's moving average; 0 is off", minimum=0, below=1)
    mixed_precision: str = option("no", "autocast of the networks", choices=("no", "bf16"))
    device: str = option("auto", "auto takes an accelerator where there is one", choices=("auto", "cpu"))
    guidance: float | None = option(None, "teacher's guidance while distilling; none means the teacher's own", minimum=0)
    init_rho: float | None = option(None, "sigma/alpha of the student's first step; none means the most noise", above=0)
    input_scale: str = option("auto", "std of the student's noise; auto: as exported", choices=("auto", "unit", "sigma"))
    student_steps: int = option(1, "network calls of the student for one sample", minimum=1)
    student: str = option("full", "train all weights of the student, or a low-rank adapter", choices=("full", "lora"))
    critic: str = option("full", "train all weights of the critic, or a low-rank adapter", choices=("full", "lora"))
    student_blocks: int | None = option(
        None, "blocks of a smaller student, of a UNet layers at each resolution; none: the teacher's", minimum=1
    )
    student_width: float = option(1.0, "channels of a smaller student, as a fraction of the teacher's", above=0)
    students: int = option(1, "networks that share the conditions, trained one after the other, one a device", minimum=1)
    only: int | None = option(None, "train this one of the students alone, 0 .. students-1", minimum=0)
    parts: str | None = option(
        None, "classes of each student, as in 0,1,4/2,3; none: equal numbers in order, prompts by their embeddings"
    )
    rank: int = option(64, "rank of the adapters", minimum=1)
    targets: str | None = option(
        None, "layers to adapt, by the ends of their names and separated by commas; none: usual ones"
    )
    weights: str = option("fp32", "dtype in which frozen networks are stored", choices=("fp32", "bf16"))
    offload: bool = option(False, "keep the teacher in the host's memory, copied to the device layer by layer: less memory")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = option(False, "compile the networks (torch.compile): the first steps take minutes, the others less time")
    optimizer: str = option("adamw", "8-bit ones need bitsandbytes", choices=("adamw", "adamw8bit", "paged-adamw8bit"))
    attention: str = option("sdpa", "xformers needs the package and CUDA", choices=("sdpa", "xformers"))
    log_every: int = option(10, "steps between log lines", minimum=1, free=True)
    grid_every: int = option(200, "steps between image grids", minimum=1, free=True)
    grid_steps: int = option(50, "steps of the teacher in the grid", minimum=1, free=True)
    grid_columns: int = option(6, "pictures in the grid for each of up to ten conditions", minimum=1, free=True)
    health_every: int | None = option(
        None, "steps between checks of health, see docs/health.md; none: as for grids; 0 is off", minimum=0, free=True
    )
    on_collapse: str = option(
        "warn", "what a check that finds a collapse does", choices=("warn", "stop", "ignore"), free=True
    )
    checkpoint_every: int = option(200, "steps between checkpoints", minimum=1, free=True)
    keep_checkpoints: int = option(2, "latest checkpoints to keep", minimum=1, free=True)
    skip_nonfinite: int = option(
        0,
        "updates with NaN or infinity to leave out, each told; 0 stops at the first one",
        minimum=0,
        free=True,
    )
    keep_best: int = option(
        0, "images that each checkpoint's average is scored on, to keep the best one's too; 0 is off", minimum=0, free=True
    )
    export_dtype: str = option("fp32", "dtype of the exported folder", choices=("fp32", "fp16", "bf16"), free=True)
    evaluate: bool = option(True, "score the exported generator at the end", free=True)

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation:
            near = max(1, round(self.batch_size / self.accumulation)) * self.accumulation
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}; "
                f"type for example --batch-size {near}"
            )
        whole = {"--student lora": self.student == "lora", "--critic lora": self.critic == "lora"}
        whole |= {"--offload": self.offload, "--gradient-checkpointing": self.gradient_checkpointing}
        whole |= {f"--weights {self.weights}": self.weights != "fp32"}
        if self.compile and (bad := [name for name, asked in whole.items() if asked]):
            raise ValueError(f"compile is not possible with {bad[0]}, which changes how layers run: leave one of them out")
        if self.only is not None and self.only >= self.students:
            raise ValueError(f"only {self.only} is none of {self.students} students; type --only 0 .. {self.students - 1}")
        if self.student_width > 1:
            raise ValueError(f"student_width {self.student_width} is wider than the teacher; type --student-width 1 or less")
        if self.offload and "lora" in (self.student, self.critic):
            raise ValueError(
                "--offload moves away the weights that adapters work on: leave it out, or train --student full and --critic "
                "full"
            )
        if self.part_list is not None and len(self.part_list) != self.students:
            raise ValueError(
                f"parts {self.parts} are those of {len(self.part_list)} students; type --students {len(self.part_list)}"
            )

    @property
    def group(self) -> Path:
        """`output`, or runs/<method>-<last part of the teacher's name>; of several students the folder of all."""
        several = f"-{self.students}-students" if self.students > 1 else ""
        return Path(self.output or f"runs/{self.method}-{Path(self.teacher).resolve().name}{several}")

    @property
    def folder(self) -> Path:
        """Folder of the run: `group`, or of one student of several its own folder there."""
        return self.group if self.only is None else self.group / f"student-{self.only}"

    @property
    def part_list(self) -> list[list[int]] | None:
        """`parts` as numbers. Raises ValueError where it is no list of lists of them."""
        if self.parts is None:
            return None
        try:
            return [[int(label) for label in part.split(",")] for part in self.parts.split("/")]
        except ValueError as error:
            raise ValueError(f"parts {self.parts} is no list of classes; type for example --parts 0,1,4/2,3") from error

    @property
    def cache_folder(self) -> Path:
        """Folder of caches: `cache`, or $ONESTEP_CACHE, or ~/.cache/onestep."""
        return Path(self.cache or os.environ.get("ONESTEP_CACHE") or "~/.cache/onestep").expanduser()


def resolve(
    method_options: type[MethodConfig],
    facts_train: Mapping[str, Any],
    recipe: Mapping[str, Any],
    flags: Mapping[str, Any],
    source: str = "the recipe",
) -> tuple[TrainConfig, Any]:
    """(TrainConfig, method_options): defaults < method_options.DEFAULTS < facts_train < INSISTS < recipe < flags.

    Facts of other methods are passed over. Raises ValueError for an unknown key of the recipe (called `source`) or the
    flags, and for a value of the wrong type, outside its limits or not among its choices.
    """
    options = options_of(TrainConfig, method_options)
    known_facts = {key: value for key, value in facts_train.items() if key in options}
    layers = (
        (method_options.DEFAULTS, "{} in the method's defaults"),
        (known_facts, "{} in the teacher's facts"),
        (method_options.INSISTS, "{} in what the method insists on"),
        (recipe, "{} in " + source.replace("{", "{{").replace("}", "}}")),
        (flags, "{}"),
    )
    values = {}
    for layer, label in layers:
        for key, value in layer.items():
            if key not in options:
                name = short(key) if layer is not flags else f"--{key}"
                raise ValueError(
                    f"no option {label.format(name)}{nearest(str(key), options) or '.'} Type --help to list all options"
                )
            name = key if layer is not flags else options[key].flag
            values[key] = options[key].parse(value, label.format(name))
    shared = {entry.name for entry in fields(TrainConfig)}
    config = TrainConfig(**{key: value for key, value in values.items() if key in shared})
    return config, method_options(**{key: value for key, value in values.items() if key not in shared})


def flat(config: TrainConfig, options: Any) -> dict[str, Any]:
    """All options in one dict, as `save_config` writes it and `load_config` returns it."""
    return asdict(config) | asdict(options)


def save_config(folder: str | Path, config: TrainConfig, options: Any) -> Path:
    """Writes every resolved option to config.yaml in the folder, made where missing, and returns its path."""
    path = Path(folder) / CONFIG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    replay = f"# Every option of this run. To replay it: {PROG} --config {shlex.quote(str(path))}\n"
    partial = path.with_name(PARTIAL)
    partial.write_text(replay + yaml.safe_dump(flat(config, options), sort_keys=False), encoding="utf-8")
    os.replace(partial, path)
    return path


def load_config(folder: str | Path) -> dict[str, Any]:
    """What `save_config` wrote there: a recipe for `resolve`. Raises ValueError as `load_recipe` does."""
    return load_recipe(Path(folder) / CONFIG_NAME)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *method_options: type) -> list[str]:
    """'lr: 0.0001 -> 5e-05' for each option that differs between two runs' flat options and forbids resuming.

    Free options and the output folder may differ; an option that there was not yet when the old run began had what is its
    default. `method_options` is needed for the same of a method's own.
    """
    known = options_of(TrainConfig, *method_options)
    ignored = {name for name, each in known.items() if each.free} | {"output"}
    absent = object()
    old = {name: each.default for name, each in known.items() if name in new} | dict(old)
    pairs = {key: (old.get(key, absent), new.get(key, absent)) for key in {**old, **new} if key not in ignored}
    return [
        f"{key}: " + " -> ".join("absent" if each is absent else shown(each) for each in pair)
        for key, pair in pairs.items()
        if pair[0] != pair[1]
    ]
