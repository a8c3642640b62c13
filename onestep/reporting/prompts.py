"""Scores prompt by prompt, of rows that have them."""

from collections.abc import Sequence
from dataclasses import dataclass

from .sources import Source
from .tables import Number, is_number, score_text

SHOWN = 20
"""Prompts of one source that are shown: those with the lowest scores."""
BY_PROMPT = "by_prompt"
"""Entry of a row: {name of a score: {prompt: value}}."""


@dataclass(frozen=True)
class Prompts:
    """The worst prompts of a row, by its score `name`; `index` is the source's place."""

    index: int
    source: str
    name: str
    lowest: list[tuple[str, Number]]
    count: int


def prompts(sources: Sequence[Source]) -> list[Prompts]:
    """Every score by prompt of every row."""
    found = []
    for index, source in enumerate(sources):
        for row in source.rows:
            given = row.get(BY_PROMPT)
            for name, scores in (given if isinstance(given, dict) else {}).items():
                values = (
                    {text: value for text, value in scores.items() if is_number(value)} if isinstance(scores, dict) else {}
                )
                if values:
                    lowest = sorted(values.items(), key=lambda item: item[1])[:SHOWN]
                    numbers = [(text, Number(value, score_text(name, value))) for text, value in lowest]
                    found.append(Prompts(index, source.name, name, numbers, len(values)))
    return found
