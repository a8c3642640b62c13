"""The page: one HTML file without scripts and without anything from elsewhere; all that comes from files is escaped."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .chart import Line, chart
from .latency import COLUMNS, speeds
from .looks import Looks
from .pictures import THUMBNAIL, Picture, picture
from .prompts import prompts
from .sources import Source
from .tables import is_number, options_table, origin, tables

THUMBNAILS = 12
"""Pictures over time that are shown of one run, the first and the last among them."""
ENDS = ("lr", "images_per_second")
"""Quantities whose charts come after the losses, and are never logarithmic: they are seen in full."""


@dataclass(frozen=True)
class Panel:
    """One chart and the last value of each of its lines."""

    title: str
    drawing: Markup
    lines: Sequence[Line]


@dataclass(frozen=True)
class Pictures:
    """The pictures of one source."""

    index: int
    source: Source
    large: Picture | None
    title: str
    thumbnails: Sequence[tuple[str, Picture]]
    passed_over: int


def page(sources: Sequence[Source], made: Sequence[Looks], arguments: Sequence[str]) -> str:
    """HTML for these sources. `made` is what `onestep.reporting.samples` has; `arguments` made the page."""
    environment = Environment(
        loader=PackageLoader("onestep.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scored = tables(sources)
    pictures = [shown for index, source in enumerate(sources) if (shown := _pictures(index, source))]
    return environment.get_template("page.html").render(
        css=Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8")),
        title=" · ".join(source.name for source in sources[:3]) + (f" and {len(sources) - 3} more" if sources[3:] else ""),
        sources=sources,
        styles=[Line("", index, ()).style for index in range(len(sources))],
        tables=scored,
        errors=[(i, s.name, str(row["error"])) for i, s in enumerate(sources) for row in s.rows if "error" in row],
        prompts=prompts(sources),
        speeds=speeds(sources),
        speed_columns=COLUMNS,
        pictures=pictures,
        losses=list(_panels(sources, health=False)),
        health=list(_panels(sources, health=True)),
        healthy=[(i, s.name, each) for i, s in enumerate(sources) if s.health and (each := _picture(s.health, s))],
        made=made,
        classes=class_tables(made),
        options=options_table(sources),
        configured=[(index, source) for index, source in enumerate(sources) if source.config],
        origins=[(line.index, line.name, origin(line.row)) for table in scored for line in table.rows],
        command="python -m onestep.report " + shlex.join(arguments),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _panels(sources: Sequence[Source], health: bool) -> Iterator[Panel]:
    """Charts of what metrics.jsonl holds: the rows named health/..., or all others."""
    names = dict.fromkeys(
        name
        for source in sources
        for row in source.steps
        for name, value in row.items()
        if name != "step" and is_number(value) and name.startswith("health/") == health
    )
    for name in sorted(names, key=lambda name: ENDS.index(name) if name in ENDS else -1):
        lines = []
        for index, source in enumerate(sources):
            points = [(row["step"], row[name]) for row in source.steps if is_number(row.get(name))]
            if points:
                lines.append(Line(source.name, index, points))
        if drawing := chart(name, lines, may_log=name not in ENDS):
            yield Panel(name.removeprefix("health/").replace("_", " "), drawing, lines)


def class_tables(made: Sequence[Looks]) -> list[list[Looks]]:
    """Those that have the same classes and counts, and so stand side by side."""
    alike: dict[tuple[object, ...], list[Looks]] = {}
    for each in made:
        alike.setdefault((each.about, *(line.name for line in each.classes)), []).append(each)
    return list(alike.values())


def _pictures(index: int, source: Source) -> Pictures | None:
    """Damaged pictures become notes of the source."""
    chosen = _spread(source.grids, THUMBNAILS)
    small = [(_step(path), each) for path in chosen if (each := _picture(path, source, THUMBNAIL))]
    large = _picture(source.last, source) if source.last else None
    if large is None and not small:
        return None
    title = "teacher and student from the same noise"
    if source.last and source.last in source.grids:
        title += f", {_step(source.last)}"
    return Pictures(index, source, large, title, small if len(small) > 1 else [], len(source.grids) - len(chosen))


def _picture(path: Path, source: Source, widest: int | None = None) -> Picture | None:
    try:
        return picture(path) if widest is None else picture(path, widest)
    except ValueError as error:
        if str(error) not in source.notes:
            source.notes.append(str(error))
        return None


def _step(path: Path) -> str:
    number = path.stem.removeprefix("step-")
    return f"step {int(number):,}" if number.isdecimal() else path.stem


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many of them, evenly, the first and the last included."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(place * (len(paths) - 1) / (most - 1))] for place in range(most)]
