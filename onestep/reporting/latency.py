"""Speed: the rows that eval/latency.py makes, see `onestep.metrics.speed.speed`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .sources import Row, Source
from .tables import Number, is_number, origin

PARTS = {"latency": "one image", "throughput": "best batch"}
COLUMNS = ("batch size", "whole call", "network alone", "passes an image", "images/s", "peak memory")


@dataclass(frozen=True)
class Speed:
    """One measurement; `index` is the source's place, `detail` says of what and on which machine."""

    index: int
    name: str
    detail: str
    numbers: Mapping[str, Number]


def speeds(sources: Sequence[Source]) -> list[Speed]:
    """The latency of one image and the throughput of the best batch of every row that has them."""
    return [
        Speed(index, f"{source.name}, {title}", _about(row), dict(_numbers(row[part])))
        for index, source in enumerate(sources)
        for row in source.rows
        for part, title in PARTS.items()
        if isinstance(row.get(part), dict)
    ]


def _about(row: Row) -> str:
    facts = origin(row)
    threads = f"{facts['threads']} threads" if facts["threads"] else ""
    steps = f"steps {row['steps']}" if "steps" in row else ""
    return ", ".join(filter(None, (str(row.get("export") or ""), steps, facts["machine"], threads)))


def _numbers(of: Mapping[str, Any]) -> Iterator[tuple[str, Number]]:
    """By COLUMNS; what a row does not have is left out."""
    texts = (
        _number(of.get("batch_size"), "{:,}"),
        _times(of.get("pipeline")),
        _times(of.get("network")),
        _number(of.get("passes_per_image"), "{:g}"),
        _number(of.get("images_per_s"), "{:,.4g}"),
        _number(of.get("peak_memory_bytes"), "{:,.0f} MiB", 2**20),
    )
    yield from ((name, number) for name, number in zip(COLUMNS, texts) if number is not None)


def _number(value: Any, text: str, unit: int = 1) -> Number | None:
    return Number(value, text.format(value / unit if unit > 1 else value)) if is_number(value) else None


def _times(of: Any) -> Number | None:
    """Median, and the quartiles in the place of an interval."""
    keys = ("median_s", "lower_quartile_s", "upper_quartile_s")
    if not isinstance(of, dict) or not all(is_number(of.get(key)) for key in keys):
        return None
    median, low, high = (of[key] for key in keys)
    return Number(median, _milliseconds(median), f"{_milliseconds(low).removesuffix(' ms')} – {_milliseconds(high)}")


def _milliseconds(seconds: float) -> str:
    return f"{f'{1000 * seconds:#.4g}'.rstrip('.')} ms" if seconds < 10 else f"{1000 * seconds:,.0f} ms"
