"""The one maker of charts: points become coordinates, ticks and labels, for a template or a picture to draw.

Knows nothing of HTML, colours or runs.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from jlora.reports.figures import compact

Point = tuple[float, float | None]  # None is a value that cannot be drawn
Spot = tuple[float, float]
STEP = "training step"
# A curve has at most so many points, dots at them where there are few, and places where its values are read off.
MOST_POINTS, MOST_DOTS, MOST_READINGS = 600, 60, 48
# Where a name may stand beside its spot, the first free place of them: its anchor, and how far to move it.
PLACES = tuple((end, x, y) for x, y in ((7, 4), (4, -12), (4, 20), (4, -28), (4, 36)) for end in ("start", "end"))
LONGEST = 26  # letters of a name beside a value
LETTER = (7.5, 12)  # a letter's width and height at most


@dataclass(frozen=True)
class Line:
    """What is to be drawn in one colour.

    Attributes:
      kind: names of its style.
      marked: a dot at every point, not at lonely ones alone.
      joined: points are joined, but for gaps.
      names: stand beside its points.
    """

    kind: str
    label: str
    points: list[Point]
    marked: bool = False
    joined: bool = True
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Curve:
    """A `Line` in its place: runs of joined spots, and dots with what they say."""

    kind: str
    label: str
    runs: list[list[Spot]]
    dots: list[tuple[float, float, str]]
    marked: bool


@dataclass(frozen=True)
class Reading:
    """The values at one place of the x axis, shown while a reader points between `left` and `right`.

    Attributes:
      words: each with the kind of its line; the first says where.
    """

    left: float
    right: float
    x: float
    words: list[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """A chart in a box of `width` x `height`, y downwards; no ticks where there is nothing to draw.

    Attributes:
      extent: its values in words.
      gaps: x of values that cannot be drawn.
      bars: x, y, width, height, and what each says.
      names: x, y, anchor (start or end) and text beside spots.
      readings: side by side, over its whole width.
    """

    width: ClassVar = 400
    height: ClassVar = 250
    left: ClassVar = 52
    right: ClassVar = 380
    top: ClassVar = 30
    base: ClassVar = 206

    title: str
    unit: str = ""
    across: str = ""
    extent: str = ""
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    names: list[tuple[float, float, str, str]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


def thinned(points: list[Point], limit: int = MOST_POINTS) -> list[Point]:
    """At most `limit` points: each bucket keeps its extremes and one gap, so that no spike is lost."""
    kept, buckets = [], limit // 3
    for b in range(buckets if len(points) > limit else 0):
        chunk = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        ranked = sorted((p for p in chunk if p[1] is not None), key=lambda p: p[1] or 0.0)
        gap = [p for p in chunk if p[1] is None][:1]
        kept += sorted({*ranked[:1], *ranked[-1:], *gap}, key=lambda p: p[0])
    return kept or points


def smoothed(points: list[Point], span: int) -> list[Point]:
    """Exponential moving average, bias-corrected so that the first values are not pulled towards zero."""
    alpha, total, weight, out = 2 / (span + 1), 0.0, 0.0, []
    for x, y in points:
        if y is not None:
            total, weight = total + alpha * (y - total), weight + alpha * (1 - weight)
        out.append((x, None if y is None else total / weight))
    return out


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    x_range: tuple[float, float],
    *,
    across: str = STEP,
    x_names: Sequence[str] = (),
    x_least: float = 1.0,
    bars: Sequence[tuple[float, float, int, str]] = (),
) -> Chart:
    """Lines, or bars, over one pair of axes.

    Args:
      x_names: of 0, 1, ... instead of numbers; x_least: the least step between numbers.
      bars: from x to x, a count, and what the bar says.
    """
    values = [y for line in lines for _, y in line.points if y is not None] + [count for *_, count, _ in bars]
    gaps = sorted({x for line in lines for x, y in line.points if y is None})
    if not values and not gaps:
        return Chart(title)
    low, high = min(values, default=0.0), max(values, default=1.0)
    # A loss axis from zero would flatten its curve.
    step, first, last = _axis(low if "loss" in title.lower() else min(low, 0.0), high, 1.0 if bars else 0.0)
    box = Chart

    def place(x: float, y: float) -> Spot:
        right = (x - x_range[0]) / (x_range[1] - x_range[0]) * (box.right - box.left)
        up = (y / step - first) / (last - first) * (box.base - box.top)
        return round(box.left + right, 1), round(box.base - up, 1)

    labels, power = _labels(step, first, last)
    x_step = 1.0 if x_names else max(x_least, _tick_step(x_range[1] - x_range[0]))
    x_ticks = range(math.ceil(x_range[0] / x_step), math.floor(x_range[1] / x_step) + 1)
    curves = [_curve(line, place, across, x_names) for line in lines]
    named = [(each, name) for line in lines for each, name in zip(line.points, line.names, strict=False)]
    return Chart(
        title,
        unit + power,
        across,
        f"{min(values):.4g} to {max(values):.4g} {unit}" if values else "no finite value",
        x_ticks=[(place(k * x_step, 0)[0], x_names[k] if x_names else compact(k * x_step)) for k in x_ticks],
        y_ticks=[(place(0, k * step)[1], label) for k, label in zip(range(first, last + 1), labels, strict=True)],
        curves=[curve for curve in curves if curve.runs or curve.dots],
        gaps=[place(x, 0)[0] for x in gaps],
        bars=[_bar(place(start, count), place(end, 0), text) for start, end, count, text in bars],
        names=_beside([(place(x, y), name) for (x, y), name in named if y is not None]),
        readings=_readings(lines, lambda x: place(x, 0)[0]) if across == STEP else [],
    )


def _tick_step(span: float) -> float:
    """The round step (1, 2 or 5 times a power of ten) that cuts `span` into at most five parts."""
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    return next((m * magnitude for m in (1, 2, 5) if m * magnitude >= span / 5.005), 10 * magnitude)


def _axis(low: float, high: float, least: float) -> tuple[float, int, int]:
    """The step between ticks, `least` or more, and the first and the last tick in steps."""
    if high - low <= 1e-3 * max(abs(high), abs(low)):  # one point, or a flat line, still needs a range
        pad = 0.1 * abs(high)
        low, high = (low - pad, high + pad) if pad else (0.0, 1.0)
    step = max(least, _tick_step(high - low))
    return step, math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)


def _labels(step: float, first: int, last: int) -> tuple[list[str], str]:
    """Labels that fit beside the axis, and the power of ten that stands above it for all: 2.0 and ×10⁻⁴."""
    power = math.floor(math.log10(max(abs(first), abs(last)) * step) + 1e-9)
    power = 0 if -2 < power < 5 else power  # as the ticks of any learning rate
    decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
    labels = [f"{k * step / 10.0**power:,.{decimals}f}".replace("-", "−") for k in range(first, last + 1)]
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return labels, f", ×10{exponent}" if power else ""


def _curve(line: Line, place: Callable[[float, float], Spot], across: str, x_names: Sequence[str]) -> Curve:
    """A line broken at gaps. A point with no drawable neighbour gets a dot: a line would hide it."""
    runs: list[list[Spot]] = [[]]
    dots = []
    points = thinned(line.points)
    edged = [(0.0, None), *points, (0.0, None)]
    for number, ((_, before), (x, y), (_, after)) in enumerate(zip(edged, points, edged[2:], strict=False)):
        if y is None:
            runs.append([])
            continue
        runs[-1].append(place(x, y))
        if line.marked or (before is None and after is None):
            name = x_names[round(x)] if x_names else line.names[number] if line.names else f"{across} {x:,.0f}"
            dots.append((*runs[-1][-1], f"{name}: {y:.4g}"))
    return Curve(line.kind, line.label, [run for run in runs if run and line.joined], dots, line.marked)


def _readings(lines: Sequence[Line], across: Callable[[float], float]) -> list[Reading]:
    """Values to read off at some of the x that lines have points at: where most lines have one, and evenly spread."""
    values = [{x: y for x, y in line.points if y is not None} for line in lines]
    counts = Counter(x for known in values for x in known)
    places: dict[int, float] = {}
    for x in sorted(counts):
        slot = round((across(x) - Chart.left) / (Chart.right - Chart.left) * (MOST_READINGS - 1))
        if slot not in places or counts[x] > counts[places[slot]]:
            places[slot] = x
    chosen = [(x, across(x)) for x in places.values()]
    ends = [round((one + other) / 2, 1) for (_, one), (_, other) in pairwise(chosen)]
    edges = pairwise([Chart.left, *ends, Chart.right])
    return [
        Reading(left, right, spot, [("", f"step {x:,.0f}"), *_words(lines, values, x)])
        for (x, spot), (left, right) in zip(chosen, edges, strict=False)
    ]


def _words(lines: Sequence[Line], values: list[dict[float, float]], x: float) -> list[tuple[str, str]]:
    """What each line's value at x is; a long name keeps its end, which tells runs of one folder apart."""
    names = [line.label if len(line.label) <= LONGEST else f"…{line.label[1 - LONGEST :]}" for line in lines]
    known = [(line.kind, name, each[x]) for line, name, each in zip(lines, names, values, strict=True) if x in each]
    return [(kind, f"{name} {value:.4g}".strip()) for kind, name, value in known]


def _bar(top: Spot, foot: Spot, text: str) -> tuple[float, float, float, float, str]:
    return top[0] + 0.5, top[1], max(round(foot[0] - top[0] - 1, 1), 0.5), round(foot[1] - top[1], 1), text


def _beside(named: list[tuple[Spot, str]]) -> list[tuple[float, float, str, str]]:
    """Names where they cover neither a spot nor another name; one without such a place is left to its dot to say."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for (x, y), _ in named]
    out = []
    for (x, y), name in named:
        for anchor, right, down in PLACES:
            at = x + right if anchor == "start" else x - right
            start = at if anchor == "start" else at - LETTER[0] * len(name)
            end, top, foot = start + LETTER[0] * len(name), y + down - LETTER[1], y + down + 3
            covers = any(start < r and le < end and top < b and t < foot for le, t, r, b in taken)
            if not covers and Chart.left < start and end < Chart.width:
                taken.append((start, top, end, foot))
                out.append((at, y + down, anchor, name))
                break
    return out
