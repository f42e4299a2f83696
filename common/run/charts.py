"""Line charts as SVG text. They need no network and no script, and take the colours of the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 270  # of the drawing; a page scales it, and its text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40  # margins around the curves
LOGARITHMIC_FROM = 20  # ratio of the largest to the smallest value
MAX_POINTS = 800  # of a curve; more than that are averaged


@dataclass(frozen=True)
class Curve:
    """points: (x, y), x ascending. style: a class of the page's style sheet. dots: mark each point, with its value."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False


def line_chart(title: str, x_label: str, curves: Sequence[Curve], *, from_zero: bool = True) -> str:
    """An <svg> element, or an empty text when no curve has a finite point.

    from_zero: the y axis begins at zero; otherwise values far apart get a logarithmic scale.
    """
    curves = [Curve(c.name, thinned(_finite(c.points)), c.style, c.dots) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    logarithmic = not from_zero and 0 < LOGARITHMIC_FROM * min(ys) < max(ys)
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = decades(min(ys), max(ys)) if logarithmic else ticks(0.0 if from_zero else min(ys), max(ys))
    left, right = min(xs), max(xs)
    low, high = scale(y_ticks[0]), scale(y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (scale(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        _, at = place(left, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        if left <= x <= right:
            at, _ = place(x, y_ticks[0])
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(x)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    for curve in curves:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve.points))
        parts.append(f'<polyline class="{curve.style}" points="{line}"/>')
        for point in curve.points if curve.dots or len(curve.points) == 1 else ():  # no line shows one point
            x, y = place(*point)
            label = f"{escape(curve.name)}, {_number(point[0])}: {point[1]:.4g}"
            parts.append(
                f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{label}</title></circle>'
            )
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, ascending, that begin at or below `low` and end at or above `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten, ascending, that begin at or below `low` and end at or above `high`; both above 0."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of neighbouring ones."""
    each = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + each] for start in range(0, len(points), max(each, 1))]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}" if value == int(value) else f"{value:.4g}"
