"""Options of a run: one dataclass field is one flag and one YAML key, without importing torch.

Precedence: a method's DEFAULTS over the dataclass defaults < the teacher's facts < `--config recipe.yaml` < flags.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from types import NoneType
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

import yaml

CONFIG_NAME = "config.yaml"
PROG = "python -m onestep.train"


def option(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    free: bool = False,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is a flag. `minimum` is inclusive, `above` and `below` are not; None means no limit.

    A `free` option may change when a run is resumed. Types of field are int, float, str, bool, and each of them | None.
    """
    limits = {"minimum": minimum, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "choices": choices, "free": free, **limits})


@dataclass
class TrainConfig:
    """Options that every method shares."""

    method: str = option("dmd2", "distillation method")
    teacher: str = option("fashion", "known teacher, diffusers folder or hub id")
    output: str | None = option(None, "folder of the run; none means runs/<method>-<teacher>")
    data: str | None = option(None, "embedded data by name, or a folder of class folders with images")
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
    mixed_precision: str = option("no", "autocast of the networks", choices=("no", "bf16", "fp16"))
    device: str = option("auto", "torch device; auto takes an accelerator where there is one")
    guidance: float | None = option(None, "teacher's guidance while distilling; none means the teacher's own", minimum=0)
    init_rho: float | None = option(None, "sigma/alpha of the student's first step; none means the most noise", above=0)
    input_scale: str = option("auto", "std of the student's noise; auto: as exported", choices=("auto", "unit", "sigma"))
    student_steps: int = option(1, "network calls of the student for one sample", minimum=1)
    log_every: int = option(10, "steps between log lines", minimum=1, free=True)
    grid_every: int = option(200, "steps between image grids", minimum=1, free=True)
    grid_steps: int = option(50, "steps of the teacher in the grid", minimum=1, free=True)
    checkpoint_every: int = option(200, "steps between checkpoints", minimum=1, free=True)
    keep_checkpoints: int = option(2, "latest checkpoints to keep", minimum=1, free=True)
    export_dtype: str = option("fp32", "dtype of the exported folder", choices=("fp32", "fp16", "bf16"), free=True)
    evaluate: bool = option(True, "score the exported generator at the end", free=True)

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation:
            near = max(1, round(self.batch_size / self.accumulation)) * self.accumulation
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}; "
                f"type for example --batch-size {near}"
            )

    @property
    def folder(self) -> Path:
        """Folder of the run: `output`, or runs/<method>-<last part of the teacher's name>."""
        return Path(self.output or f"runs/{self.method}-{Path(self.teacher).resolve().name}")


@dataclass(frozen=True)
class Option:
    """What is known of one option: see `option`; `kind` is int, float, str or bool."""

    name: str
    kind: type
    nullable: bool
    default: Any
    help: str
    choices: Sequence[str] | None
    free: bool
    minimum: float | None
    above: float | None
    below: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        kinds = {int: "an integer", float: "a finite number", str: "a text that is not empty", bool: "true or false"}
        words = f"one of {', '.join(self.choices)}" if self.choices else kinds[self.kind]
        limits = {"at least": self.minimum, "above": self.above, "below": self.below}
        words += "".join(f" {word} {limit}" for word, limit in limits.items() if limit is not None)
        return words + (", or none" if self.nullable else "")

    def parse(self, value: Any, label: str) -> Any:
        """`value` from YAML or the command line as the option's type. Raises ValueError, which calls it `label`."""
        if self.nullable and (value is None or (isinstance(value, str) and value.lower() == "none")):
            return None
        if value is False and self.choices and "no" in self.choices:
            return "no"  # YAML 1.1 reads a bare `no` as false
        try:
            parsed = self._typed(value)
            valid = self._within(parsed)
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            near = nearest(str(value), self.choices or ()) if isinstance(value, str) else ""
            example = f"; for example {shown(self.default)}" if self.default is not None else ""
            raise ValueError(f"{label} is {short(value)}; allowed is {self.allowed}{near or example}")
        return parsed

    def _typed(self, value: Any) -> Any:
        # PyYAML reads 1e-4 as a string, hence strings are parsed for both kinds of number
        accepted = {int: (int, str), float: (int, float, str)}.get(self.kind, (self.kind,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            raise TypeError
        return self.kind(value)

    def _within(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in self.choices if self.choices else value != ""
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def options_of(*owners: type) -> dict[str, Option]:
    """The options of these dataclasses by name, which share one namespace."""
    found: dict[str, Option] = {}
    for owner in owners:
        hints = get_type_hints(owner)
        for entry in fields(owner):
            assert entry.name not in {*found, "config", "dry_run", "restart"}, f"two options named {entry.name}"
            assert entry.metadata and entry.default is not MISSING, f"{entry.name} was not made by option()"
            kinds = get_args(hints[entry.name]) or (hints[entry.name],)
            (kind,) = (each for each in kinds if each is not NoneType)
            found[entry.name] = Option(entry.name, kind, NoneType in kinds, entry.default, **entry.metadata)
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean ...?', or nothing where no name is near."""
    near = get_close_matches(name, list(names), 1)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    """A value as it is typed."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def resolve(
    method_options: type,
    facts_train: Mapping[str, Any],
    recipe: Mapping[str, Any],
    flags: Mapping[str, Any],
    source: str = "the recipe",
) -> tuple[TrainConfig, Any]:
    """(TrainConfig, method_options) from defaults < DEFAULTS of method_options < facts_train < recipe < flags.

    Facts of other methods are passed over. Raises ValueError for an unknown key of the recipe (called `source`) or the
    flags, and for a value of the wrong type, outside its limits or not among its choices.
    """
    options = options_of(TrainConfig, method_options)
    known_facts = {key: value for key, value in facts_train.items() if key in options}
    layers = (
        (getattr(method_options, "DEFAULTS", {}), "{} in the method's defaults"),
        (known_facts, "{} in the teacher's facts"),
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


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked. Raises ValueError for a file that is no flat YAML mapping."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; type --config FILE with a YAML file, such as its {CONFIG_NAME}") from None
    except FileNotFoundError:
        raise ValueError(f"no file {path}; type --config FILE with an existing YAML file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None
    try:
        return _mapping(text, str(path))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except _RecipeError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # PyYAML lets KeyError, AttributeError, RecursionError and more escape on odd tags
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


class _RecipeError(Exception):
    """Valid YAML, but no recipe."""


def _mapping(text: str, path: str) -> dict[str, Any]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise _RecipeError(f"{path} is no mapping; allowed are lines like 'lr: 1e-4'")
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise _RecipeError(f"{path}, line {line}: a key is no text; allowed are lines like 'lr: 1e-4'")
            if key.value in seen:
                raise _RecipeError(
                    f"{path}, line {line}: {key.value!r} is already on line {seen[key.value]}; keep one of them"
                )
            seen[key.value] = line
        return loader.construct_document(node)
    finally:
        loader.dispose()


def flat(config: TrainConfig, options: Any) -> dict[str, Any]:
    """All options in one dict, as `save_config` writes it and `load_config` returns it."""
    return asdict(config) | asdict(options)


def save_config(folder: str | Path, config: TrainConfig, options: Any) -> Path:
    """Writes every resolved option to config.yaml in the folder, made where missing, and returns its path."""
    path = Path(folder) / CONFIG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    replay = f"# Every option of this run. To replay it: {PROG} --config {shlex.quote(str(path))}\n"
    partial = path.with_name(CONFIG_NAME + ".partial")
    partial.write_text(replay + yaml.safe_dump(flat(config, options), sort_keys=False), encoding="utf-8")
    os.replace(partial, path)
    return path


def load_config(folder: str | Path) -> dict[str, Any]:
    """What `save_config` wrote there: a recipe for `resolve`. Raises ValueError as `load_recipe` does."""
    return load_recipe(Path(folder) / CONFIG_NAME)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *method_options: type) -> list[str]:
    """'lr: 0.0001 -> 5e-05' for each option that differs between two runs' flat options and forbids resuming.

    Free options and the output folder may differ; `method_options` is needed only for free options of a method.
    """
    ignored = {name for name, each in options_of(TrainConfig, *method_options).items() if each.free} | {"output"}
    absent = object()
    pairs = {key: (old.get(key, absent), new.get(key, absent)) for key in {**old, **new} if key not in ignored}
    return [
        f"{key}: " + " -> ".join("absent" if each is absent else shown(each) for each in pair)
        for key, pair in pairs.items()
        if pair[0] != pair[1]
    ]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known, extra = self.parse_known_args(args, namespace)
        if extra:
            name = next((each for each in extra if each.startswith("-")), extra[0]).split("=")[0]
            self.error(f"no flag {name}{nearest(name, self._option_string_actions) or '.'} Type --help to list all flags")
        return known


def parser(method_options: type, facts_train: Mapping[str, Any] | None = None, method: str = "dmd2") -> Parser:
    """The command line of a run with that method; its help shows the defaults after the teacher's facts.

    The flags that were given, and only they, come out of `flags_of` unchecked, for `resolve` to check.
    """
    made = Parser(
        prog=PROG,
        usage=f"{PROG} [--method NAME] [--teacher NAME] [--config FILE] [--FLAG VALUE ...]",
        description="Distil a diffusion teacher into a one-step generator.",
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="YAML file of options, such as the config.yaml of a run")
    made.add_argument("--dry-run", action="store_true", help="show the resolved options and stop")
    made.add_argument("--restart", action="store_true", help="start over instead of resuming the run in the folder")
    defaults = flat(*resolve(method_options, facts_train or {}, {}, {}))
    for title, owner in (("run", TrainConfig), (f"options of {method}", method_options)):
        group = made.add_argument_group(title)
        for name, each in options_of(owner).items():
            text = f"{each.help} (default: {shown(defaults[name])})".replace("%", "%%")
            if each.kind is bool:
                group.add_argument(each.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
                continue
            metavar = "{" + ",".join(each.choices) + "}" if each.choices else each.kind.__name__.upper()
            group.add_argument(each.flag, metavar=metavar, default=argparse.SUPPRESS, help=text)
    return made


def flags_of(namespace: argparse.Namespace) -> dict[str, Any]:
    """The options that were given on a command line that `parser` read, by field name."""
    return {key: value for key, value in vars(namespace).items() if key not in ("config", "dry_run", "restart")}


class FirstPass(NamedTuple):
    """What must be known before the parser can be made; `config` and `recipe` are those of --config, if given."""

    method: str
    teacher: str
    config: str | None
    recipe: dict[str, Any]


def first_pass(argv: Sequence[str] | None = None) -> FirstPass:
    """Method, teacher and recipe of a command line (None: sys.argv), whatever else it holds.

    Raises ValueError where the recipe cannot be read or its method or teacher is no text.
    """
    reader = Parser(prog=PROG, add_help=False, allow_abbrev=False)
    for flag in ("--method", "--teacher", "--config"):
        reader.add_argument(flag)
    given, _ = reader.parse_known_args(argv)
    recipe = load_recipe(given.config) if given.config is not None else {}
    options = options_of(TrainConfig)
    found = []
    for name in ("method", "teacher"):
        value, label = getattr(given, name), f"--{name}"
        if value is None:
            value, label = recipe.get(name, options[name].default), f"{name} in {given.config}"
        found.append(options[name].parse(value, label))
    return FirstPass(found[0], found[1], given.config, recipe)
