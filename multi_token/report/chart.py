"""One curve as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import accumulate

_WIDTH, _HEIGHT = 520, 260
_MOST_DOTS = 40
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 506, 8, 216


Point = tuple[int, float]
"""Step and value."""


class Curve:
    """Points of a curve that grows for any time, thinned to up to 2,000.

    When there are more, equal numbers of neighbours become their least and their greatest point: a
    single spike stays visible. Values that are NaN or infinite are left out.
    """

    MOST_POINTS = 2000

    def __init__(self) -> None:
        self._first: Point | None = None
        self._last: Point | None = None
        self._points: list[Point] = []
        self._recent: list[Point] = []
        """Points of the group that is not complete yet."""
        self._group = 2
        """Points as they came that become two."""

    def add(self, step: int, value: float) -> None:
        """Add the point after the last one."""
        if not math.isfinite(value):
            return
        self._last = (step, value)
        self._first = self._first or self._last
        self._recent.append(self._last)
        if len(self._recent) < self._group:
            return
        self._points += _extremes(self._recent)
        self._recent = []
        # two points stay for the first and the last one
        if len(self._points) > self.MOST_POINTS - 6:
            fours = (self._points[i : i + 4] for i in range(0, len(self._points), 4))
            self._points = [point for four in fours for point in _extremes(four)]
            self._group *= 2

    def points(self) -> list[Point]:
        """Return the points by step, with the first and the last one as they came."""
        if self._first is None or self._last is None:
            return []
        inner = [*self._points, *_extremes(self._recent)]
        first = [] if inner[0] == self._first else [self._first]
        return [*first, *inner, *([] if inner[-1] == self._last else [self._last])]


def _extremes(points: Sequence[Point]) -> Sequence[Point]:
    """Return the least and the greatest point, in their order; one or two points as they are."""
    if len(points) <= 2:
        return points
    values = [value for _, value in points]
    both = sorted((values.index(min(values)), values.index(max(values))))
    # equal values everywhere: the last point, which keeps its distance from the first
    return [points[0], points[-1]] if both[0] == both[1] else [points[i] for i in both]


def chart(points: Sequence[Point], *, label: str, log: bool, share: bool = True) -> str:
    """Return (step, value) pairs as an SVG.

    `log`: a logarithmic axis and a smoothed line. `share`: values are shares, on an axis from 0 to
    1; else the axis ends at the largest value.
    """
    # A loss of NaN must not break the report, and a logarithm needs positive values.
    points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
    if not points:
        return "<p>There is nothing to draw.</p>"
    scale = math.log if log else float
    low, high = _value_range([y for _, y in points], log=log, share=share)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def across(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (step - first) / (last - first)

    def down(value: float) -> float:
        part = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return _BOTTOM - (_BOTTOM - _TOP) * part

    def line(values: Sequence[Point], name: str) -> str:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in values)
        return f'<polyline class="{name}" points="{path}"/>'

    marks = [
        _value_tick(value, down(value), percent=share and not log)
        for value in _value_ticks(low, high, log=log)
    ]
    marks += [
        f'<text x="{across(step):.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{step}</text>'
        for step in _step_ticks(first, last)
    ]
    if log:
        curve = line(points, "raw") + line(_smoothed(points), "smooth")
    else:
        dots = (f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="4"/>' for x, y in points)
        curve = line(points, "smooth") + ("".join(dots) if len(points) <= _MOST_DOTS else "")
    title = f"{label} from step {first} to step {last}, {points[0][1]:.3g} to {points[-1][1]:.3g}"
    axis = f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(marks)}{axis}{curve}</svg>"
    )


def _value_range(values: Sequence[float], *, log: bool, share: bool) -> tuple[float, float]:
    if not log:
        if share:
            return 0.0, 1.0
        low, high = min([0.0, *values]), max([0.0, *values])
        width = _round_up((high - low) / 4 or 0.25)
        bottom = width * math.floor(low / width)
        return bottom, width * math.ceil(high / width) if high > bottom else bottom + 4 * width
    low, high = min(values), max(values)
    # Space around the curve; at least a factor of 1.5, so that noise does not fill the axis.
    return low / 1.15, max(high, low * 1.5) * 1.15


def _value_ticks(low: float, high: float, *, log: bool) -> list[float]:
    if not log:
        # The range is whole widths already; the margin keeps rounding from doubling the width.
        width = _round_up((high - low) / 4 * 0.999)
        return [low + width * i for i in range(round((high - low) / width) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    # Over many decades, only powers of ten: more labels would overlap.
    return inside if len(inside) <= 7 else [tick for tick in inside if str(tick).strip("0.") == "1"]


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 2.5, 5 or 10 times a power of ten."""
    # With a margin: the caller's divisions leave 0.30000000000000004 for 0.3.
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= value * (1 - 1e-9))


def _step_ticks(first: int, last: int) -> list[int]:
    """Return four to eight round numbers."""
    rough = (last - first) / 8
    power = 10 ** math.floor(math.log10(rough)) if rough >= 1 else 1
    width = next(int(power * n) for n in (1, 2, 5, 10) if power * n >= rough)
    return list(range(-(-first // width) * width, last + 1, width))


def _value_tick(value: float, y: float, *, percent: bool) -> str:
    text = f"{100 * value:.0f} %" if percent else f"{value:g}" if value < 1e4 else f"{value:.3g}"
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{text}</text>'
    )


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Return running means over a tenth of the curve, of logarithms, as the axis shows them."""
    logs = [math.log(value) for _, value in points]
    reach = len(points) // 20
    # sums from the start on: a sum over each window would cost n times its length
    sums = [0.0, *accumulate(logs)]
    windows = [(max(0, i - reach), min(len(logs), i + reach + 1)) for i in range(len(logs))]
    means = [math.exp((sums[end] - sums[begin]) / (end - begin)) for begin, end in windows]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]
