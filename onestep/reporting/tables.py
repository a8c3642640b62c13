"""Tables of the page: scores that may stand beside each other, means over seeds, options, where numbers come from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from ..config import TrainConfig
from ..metrics.compare import differences
from ..options import options_of, shown
from .sources import Row, Source

COSTS = {"images_per_second": ("images/s in training", 0), "iterations": ("iterations", 0), "seconds": ("seconds", 0)}
SETTINGS = ("seed", "minutes", "batch_size", "count", "steps", "guidance", "passes_per_image", "reference_count", "size")
NO_SCORE = {*COSTS, *SETTINGS, "planned_seconds", "wall_seconds", "repeats", "classes", "transparent", "warmup"}
"""Numbers of a row that are no scores: its settings and costs."""
DECIMALS = {"FD": 2, "FID": 2, "sFD": 2, "sFID": 2, "IS": 2, "KD": 5, "KID": 5, "CMMD": 3}
DECIMALS |= {"precision": 3, "recall": 3, "density": 3, "coverage": 3}
INTERVALS = "intervals"
"""Entry of a row: [low, high] by the name of a score."""


class Number(NamedTuple):
    """A number as the file has it, as the page shows it, and its interval where there is one."""

    value: float
    text: str
    interval: str = ""


@dataclass(frozen=True)
class Scored:
    """One line of a table: a row of results of a source; `index` is the source's place, and so its colour."""

    index: int
    name: str
    detail: str
    row: Row
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class Table:
    """Rows that were scored alike. `apart` says in what they differ from the rows of the first table."""

    title: str
    about: str
    columns: list[str]
    rows: list[Scored]
    seeds: list[tuple[str, str, dict[str, str]]]
    """(name and steps, seeds, mean ± standard deviation by column) of what was trained with several seeds."""
    apart: str


def tables(sources: Sequence[Source]) -> list[Table]:
    """All rows with a score, in as many tables as there are ways of scoring that cannot be compared."""
    groups: list[list[Scored]] = []
    for line in _lines(sources):
        fitting = (group for group in groups if not any(differences(other.row, line.row) for other in group))
        group = next(fitting, None)
        if group is None:
            groups.append(group := [])
        group.append(line)
    return [_table(group, groups[0]) for group in groups]


def _lines(sources: Sequence[Source]) -> Iterator[Scored]:
    for index, source in enumerate(sources):
        for row in source.rows:
            numbers = scores(row)
            if numbers:
                options = row.get("options")
                detail = [f"{key} {value}" for key, value in options.items()] if isinstance(options, dict) else []
                own = row.get("name") if source.folder.suffix == ".jsonl" else None  # rows of eval/zoo.py say whose they are
                if source.folder.suffix == ".jsonl" and not own:
                    detail.append(str(row.get("export") or row.get("images") or ""))
                name = f"{own}, seed {row.get('seed')}" if own else source.name
                yield Scored(index, name, ", ".join(filter(None, detail)), row, numbers)


def scores(row: Row) -> dict[str, Number]:
    """The scores of a row, and then its costs, by name."""
    given = row.get(INTERVALS)
    intervals = given if isinstance(given, dict) else {}
    values = {name: value for name, value in row.items() if is_number(value) and name not in NO_SCORE}
    spread = {name.replace("_std", ""): name for name in values if "_std" in name}  # of a mean over subsets or splits
    found = {
        name: Number(
            value,
            score_text(name, value) + (f" ± {score_text(name, values[spread[name]])}" if name in spread else ""),
            _interval(name, intervals.get(name)),
        )
        for name, value in values.items()
        if name not in spread.values()
    }
    if not found:
        return {}
    return found | {
        title: Number(row[name], f"{row[name]:,.{decimals}f}")
        for name, (title, decimals) in COSTS.items()
        if is_number(row.get(name))
    }


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def score_text(name: str, value: float) -> str:
    """As the tables of eval/RESULTS.md have it."""
    bare = name.removesuffix("_proxy")
    if not math.isfinite(value):
        return str(value)
    if bare == "class_accuracy":
        return f"{value:.1%}".replace("%", " %")
    if bare.startswith("CLIPScore"):
        return f"{value:.2f}"
    return f"{value:.{DECIMALS[bare]}f}" if bare in DECIMALS else f"{value:.4g}"


def _interval(name: str, ends: Any) -> str:
    if not (isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(is_number, ends))):
        return ""
    low, high = (score_text(name, end) for end in ends)
    return f"{low.removesuffix(' %')} – {high}"


def _table(group: list[Scored], first: list[Scored]) -> Table:
    row = group[0].row
    protocol = row.get("protocol") or {}
    columns = list(dict.fromkeys(name for line in group for name in line.numbers))
    columns.sort(key=[title for title, _ in COSTS.values()].__contains__)  # costs last
    count, dataset = row.get("count"), protocol.get("dataset")
    about = [f"{count:,} images" if is_number(count) else "", f"against {dataset}" if dataset else ""]
    about += [f"features: {protocol['extractor']}" if "extractor" in protocol else ""]
    return Table(
        title=str(protocol.get("name") or row.get("mode") or "no protocol"),
        about="; ".join(filter(None, about)),
        columns=columns,
        rows=group,
        seeds=_over_seeds(group, columns),
        apart="" if group is first else "; ".join(differences(first[0].row, row)),
    )


def _over_seeds(group: Sequence[Scored], columns: Sequence[str]) -> list[tuple[str, str, dict[str, str]]]:
    alike: dict[str, list[Scored]] = {}
    for line in group:
        if "name" in line.row and "seed" in line.row:
            alike.setdefault(f"{line.row['name']}, steps {line.row.get('steps', '-')}", []).append(line)
    found = []
    for name, lines in alike.items():
        if len(lines) > 1:
            values = {each: [line.numbers[each].value for line in lines if each in line.numbers] for each in columns}
            texts = {
                each: f"{score_text(each, mean(those))} ± {score_text(each, stdev(those))}"
                for each, those in values.items()
                if len(those) == len(lines)
            }
            found.append((name, ", ".join(str(line.row["seed"]) for line in lines), texts))
    return found


def options_table(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """(option, its value in each source with options) of the options that are not the same in all of them.

    Left out are the output folder and what may change when a run is resumed; an option that there was not yet when a run
    began had what is its default.
    """
    known = options_of(TrainConfig)
    configs = [source.config for source in sources if source.config]
    names = dict.fromkeys(name for config in configs for name in config)
    ignored = {"output", *(name for name, each in known.items() if each.free)}
    found = []
    for name in names:
        values = [
            shown(config[name]) if name in config else shown(known[name].default) if name in known else "-"
            for config in configs
        ]
        if name not in ignored and len(set(values)) > 1:
            found.append((str(name), values))
    return found


def origin(row: Row) -> dict[str, str]:
    """Where a row comes from, in the page's words: commit, date, machine, versions, seeds, hash of the weights."""
    given = row.get("machine")
    machine = given if isinstance(given, dict) else {}
    seeds = row.get("seeds")
    texts = {
        "commit": row.get("commit"),
        "date": row.get("date"),
        "machine": ", ".join(str(machine[key]) for key in ("gpu", "cpu", "device") if key in machine),
        "threads": machine.get("threads"),
        "torch": row.get("torch"),
        "diffusers": row.get("diffusers"),
        "seeds": " .. ".join(map(str, seeds)) if isinstance(seeds, list) else seeds,
        "weights SHA-256": str(row.get("weights_sha256") or "")[:12],
    }
    return {name: "" if value is None else str(value) for name, value in texts.items()}
