"""Whether rows of results may stand beside each other: the same protocol, field by field."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MEASURED = (
    "count",
    "repeats",
    "mode",
    "size",
    "prompts_sha256",
    "extractor",
    "extractor_sha256",
    "reference_sha256",
    "reference_count",
)
"""What a score depends on, beside the export, of the entries outside "protocol"."""
NOTES = frozenset(f"protocol.{name}" for name in ("paper", "source", "facts", "differs", "prompts_from", "reference_from"))
"""Fields of a protocol that explain it."""


def compare(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, with the first row that differs and all of its differences, unless all are of one protocol.

    Compared are all fields of the entry "protocol" and those of `MEASURED`. What only one of two rows says (an older row
    has fewer entries; `manifold` is there where precision and recall were asked for) is no difference, but for the
    protocol's name: a row without a protocol stands beside others without one alone.
    """
    for row in rows[1:]:
        if found := differences(rows[0], row):
            raise ValueError(
                f"{_title(rows[0])} and {_title(row)} were not scored alike and cannot be compared: {'; '.join(found)}. "
                "Score both by one protocol"
            )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """ "field: value of a, value of b" for each field that forbids a comparison; empty where there is none."""
    first, second = dict(_fields(a)), dict(_fields(b))
    names = [*first, *(name for name in second if name not in first)]
    compared = [name for name in names if (name in first and name in second) or name == "protocol.name"]
    return [
        f"{name}: {first.get(name, 'none')} and {second.get(name, 'none')}"
        for name in compared
        if first.get(name) != second.get(name)
    ]


def _fields(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    stored = json.loads(json.dumps(row.get("protocol", {})))  # a tuple is a list in a stored row
    yield from ((name, value) for name, value in _flat("protocol", stored) if name not in NOTES)
    for name in MEASURED:
        if row.get(name) is not None:
            yield name, row[name]


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}.{name}", value)
        elif value is not None:
            yield f"{prefix}.{name}", value


def _title(row: Mapping[str, Any]) -> str:
    protocol = row.get("protocol", {}).get("name", "no protocol")
    return f"{row.get('export') or row.get('images') or row.get('teacher') or row.get('method') or 'a row'} ({protocol})"
