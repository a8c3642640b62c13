"""Command lines: errors in one line, and the flags of a training run, without importing torch."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .config import PROG, TrainConfig, flat, resolve
from .options import load_recipe, nearest, options_of, shown


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        more = f"; type {self.prog} --help" if message.startswith("the following arguments") else ""
        print(f"error: {' '.join(message.split())}{more}", file=sys.stderr)
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
