"""What an option is: a dataclass field that is one flag and one YAML key, its limits and its errors, without torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml


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


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked. Raises ValueError for a file that is no flat YAML mapping."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; type --config FILE with a YAML file, such as its config.yaml") from None
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
