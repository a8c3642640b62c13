"""Line charts as inline SVG: their colours are the page's, which a picture made elsewhere could not follow into the dark."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
"""Margins around the axes, in the units of the view box."""
GROUPS = 150
"""Points of a line at most; a longer one shows means and the band of what it has averaged."""
COLOURS = 8
"""Classes c0 .. c7 of the style sheet; the dashes change with every round of them."""


@dataclass(frozen=True)
class Line:
    """A run's values of one quantity over the training steps; `index` chooses its colour and dashes."""

    name: str
    index: int
    points: Sequence[tuple[float, float]]

    @property
    def style(self) -> str:
        return f"c{self.index % COLOURS} d{self.index // COLOURS % 4}"


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to [start, end], by logarithms if asked to."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round numbers inside, `most` at most: of the form 1, 2 or 5 times a power of ten, or powers of ten."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            every = max(1, -(-len(powers) // most))
            return [10.0**power for power in powers if power % every == 0]
        rough = (self.high - self.low) / most
        unit = 10 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def vertical(values: Sequence[float], may_log: bool = True) -> Axis:
    """The axis of these values: logarithmic, if it may, where all are positive and differ by a factor over 50."""
    low, high = min(values), max(values)
    if may_log and low > 0 and high / low > 50:
        return Axis(low / 1.2, high * 1.2, HEIGHT - BOTTOM, TOP, log=True)
    margin = 0.06 * (high - low) or abs(high) / 10 or 1.0
    # a scale of positive values does not go below zero
    return Axis(low - margin if low < 0 else max(0.0, low - margin), high + margin, HEIGHT - BOTTOM, TOP)


def grouped(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float, float, float]]:
    """(step, mean, least, largest) of at most GROUPS runs of consecutive points; values that are not finite are left out."""
    finite = [point for point in points if math.isfinite(point[1])]
    size = -(-len(finite) // GROUPS)
    for start in range(0, len(finite), max(1, size)):
        steps, values = zip(*finite[start : start + size])
        yield steps[-1], sum(values) / len(values), min(values), max(values)


def chart(title: str, lines: Sequence[Line], may_log: bool = True) -> Markup:
    """The lines over each other, over the steps; an empty text where none has a finite value."""
    groups = [(line, group) for line in lines if (group := list(grouped(line.points)))]
    if not groups:
        return Markup("")
    every = [point for _, group in groups for point in group]
    y = vertical([value for point in every for value in point[1:]], may_log)
    x = Axis(0, max(point[0] for point in every) or 1, LEFT, WIDTH - RIGHT)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over the training steps">']
    for value in y.ticks(5):
        parts.append(f'<path class="rule" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x.ticks(5):
        anchor = "end" if x(value) > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for line, group in groups:
        parts += _drawn(line, group, x, y)
    return Markup("".join([*parts, "</svg>"]))


def _drawn(line: Line, group: Sequence[tuple[float, float, float, float]], x: Axis, y: Axis) -> Iterator[str]:
    def path(points: Sequence[tuple[float, float]]) -> str:
        return "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)

    steps = [point[0] for point in group]
    if any(least < largest for _, _, least, largest in group):
        upper, lower = [point[3] for point in group], [point[2] for point in group]
        around = path([*zip(steps, upper), *zip(steps[::-1], lower[::-1])])
        yield f'<path class="band {line.style}" d="M{around}Z"/>'
    title = f"<title>{escape(line.name)}</title>"
    if len(group) == 1:
        yield f'<circle class="dot {line.style}" cx="{x(steps[0]):.1f}" cy="{y(group[0][1]):.1f}" r="3">{title}</circle>'
    yield f'<path class="line {line.style}" d="M{path([point[:2] for point in group])}">{title}</path>'


def short(value: float) -> str:
    """A number on an axis: 0, 0.05, 1200, 20k, 3M, 1e-5."""
    size = abs(value)
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if limit <= size < 1e9:
            return f"{value / (1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")
