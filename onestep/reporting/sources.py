"""What runs, exports, comparisons and files of results say of themselves: texts, numbers and the paths of pictures."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import CONFIG_NAME, load_config
from ..saved import RESULTS_NAME, SCORE

Row = dict[str, Any]
COMPARISON = "zoo.jsonl"


@dataclass
class Source:
    """One run, export or file of results; everything but `name` and `folder` may be missing."""

    name: str
    folder: Path
    config: Row = field(default_factory=dict)
    """All options, as `load_config` returns them."""
    steps: list[Row] = field(default_factory=list)
    """Rows of metrics.jsonl."""
    rows: list[Row] = field(default_factory=list)
    """Rows of results, see `onestep.metrics.evaluate`."""
    grids: list[Path] = field(default_factory=list)
    """Pictures over time, in order."""
    last: Path | None = None
    """The picture to show large."""
    health: Path | None = None
    """The last picture of the checks of its health."""
    export: Path | None = None
    notes: list[str] = field(default_factory=list)
    """What the page's reader has to know: unfinished, torn lines, no results."""


def read(paths: Sequence[Path]) -> list[Source]:
    """The sources in these folders and files, with names that differ. Raises ValueError for what is none of them."""
    found: dict[Path, Source] = {}
    for path in paths:
        for source in _read(path):
            found.setdefault(source.folder.resolve(), source)
    sources = list(found.values())
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            source.name = str(source.folder)
    return sources


def _read(path: Path) -> list[Source]:
    if path.is_file() and path.suffix == ".jsonl":
        return [_results(path)]
    if (path / CONFIG_NAME).is_file():
        return [_run(path)]
    if (path / "model_index.json").is_file():
        return [_export(path)]
    if (path / COMPARISON).is_file():
        return _comparison(path)
    if path.is_dir() and (runs := sorted(each.parent for each in path.glob(f"*/{CONFIG_NAME}"))):
        return [_run(run) for run in runs]
    if not path.exists():
        what = f"there is no {path}"
    else:
        what = f"{path} is empty" if path.is_dir() and not any(path.iterdir()) else f"{path} is nothing that can be reported"
    raise ValueError(
        f"{what}; allowed are a run of onestep.train (with {CONFIG_NAME}), a folder of runs, an exported diffusers folder "
        f"(with model_index.json), a folder of eval/zoo.py (with {COMPARISON}) and a results.jsonl: name one of these"
    )


def _run(folder: Path) -> Source:
    """Raises ValueError for a config.yaml that is none."""
    config = load_config(folder)
    if missing := [key for key in ("method", "teacher") if not isinstance(config.get(key), str)]:
        raise ValueError(f"{folder / CONFIG_NAME} names no {missing[0]}: name the folder of a run of onestep.train")
    source = Source(_name(folder), folder, config)
    source.steps = [row for row in rows_in(folder / "metrics.jsonl", source.notes) if isinstance(row.get("step"), int)]
    source.rows = results_in(folder / RESULTS_NAME, source.notes)
    source.rows += rows_in(folder / "latency.jsonl", source.notes)
    source.grids = sorted((folder / "grids").glob("step-*.png"))
    final = folder / "grid.png"
    source.last = final if final.is_file() else next(iter(source.grids[::-1]), None)
    source.health = max((folder / "health").glob("step-*.png"), default=None)
    if (folder / "export" / "model_index.json").is_file():
        source.export = folder / "export"
    reached, asked = source.steps[-1]["step"] if source.steps else 0, config.get("iterations", 0)
    if reached < asked:
        source.notes.insert(0, f"not finished: step {reached:,} of {asked:,}")
    if not source.rows:
        source.notes.append("no results yet")
    return source


def _export(folder: Path) -> Source:
    """Options and score are those of the model card, where it is one of onestep."""
    name = f"{_name(folder.resolve().parent)}/{_name(folder)}" if folder.name.startswith("export") else _name(folder)
    source = Source(name, folder, export=folder)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if block := re.search(r"```yaml\n(.*?)```", text, re.DOTALL):
        try:
            config = yaml.safe_load(block[1])
        except yaml.YAMLError:
            source.notes.append("the options in the model card cannot be read")
        else:
            source.config = config if isinstance(config, dict) else {}
    row = _row_of_card(text)
    source.rows = [row] if row else []
    if not row:
        source.notes.append("no score in its model card")
    return source


def _row_of_card(text: str) -> Row:
    """The row that `onestep.card.update_score` wrote; empty without one."""
    row: Row = {}
    for line in text.partition(SCORE[0])[2].partition(SCORE[1])[0].splitlines():
        if entry := re.fullmatch(r"\| (\w[^|]*?) \| (.*) \|", line):
            try:
                row[entry[1]] = json.loads(entry[2])
            except ValueError:
                row[entry[1]] = entry[2]
    return row


def _comparison(folder: Path) -> list[Source]:
    """A source for the comparison's own picture, then one for each of its runs, with all rows that it has there."""
    head = Source(_name(folder), folder)
    head.last = folder / "zoo.png" if (folder / "zoo.png").is_file() else None
    runs: dict[str, Source] = {}
    for row in results_in(folder / COMPARISON, head.notes):
        name = f"{row.get('name')}-seed-{row.get('seed')}"
        if name not in runs:
            there = (folder / name / CONFIG_NAME).is_file()
            runs[name] = _run(folder / name) if there else Source(name, folder / name, notes=["its folder is gone"])
            runs[name].rows, runs[name].notes = [], [note for note in runs[name].notes if note != "no results yet"]
        runs[name].rows.append(row)
    for run in sorted(each.parent for each in folder.glob(f"*/{CONFIG_NAME}")):
        if run.name not in runs:
            runs[run.name] = _run(run)
    return [head, *runs.values()] if head.last or head.notes else list(runs.values())


def _results(path: Path) -> Source:
    source = Source(path.name, path)
    source.rows = results_in(path, source.notes)
    if not source.rows:
        raise ValueError(f"{path} holds no row of results; name a file that onestep.evaluate or eval/fid.py has written")
    return source


def results_in(path: Path, notes: list[str]) -> list[Row]:
    """The rows of results in a file; one whose protocol is not a protocol's fields is told in `notes`."""
    rows = rows_in(path, notes)
    sound = [row for row in rows if isinstance(row.get("protocol", {}), dict)]
    if len(sound) < len(rows):
        notes.append(f"{len(rows) - len(sound)} rows of {path.name} have no sound protocol and are left out")
    return sound


def rows_in(path: Path, notes: list[str]) -> list[Row]:
    """The objects in a JSON-lines file, none where there is no file; lines that are none are told in `notes`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            bad.append(number)
    if bad == [len(lines)]:
        notes.append(f"the last line of {path.name} is cut off and left out")
    elif bad:
        notes.append(f"{path.name} has lines that cannot be read, left out: {_list(bad)}")
    return rows


def _list(numbers: Iterable[int], most: int = 5) -> str:
    texts = [str(number) for number in numbers]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _name(folder: Path) -> str:
    return folder.resolve().name
