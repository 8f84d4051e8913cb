"""Line charts as inline SVG: axes, ticks, bands, markers. Colours are CSS classes, so the page may be light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 38
COLOURS = 8  # the page defines the classes c0 to c7


@dataclass(frozen=True)
class Line:
    """One curve. `band` is (x, low, high); `smooth` draws the points faintly under their moving average."""

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    colour: int = 0
    smooth: bool = False
    dashed: bool = False


def line_chart(lines: Sequence[Line], *, x_label: str, alt: str, y_range: tuple[float, float] | None = None,
               x_whole: bool = True) -> str:
    """An <svg> of all lines over common axes; "" where no line has a point. The y axis covers at least `y_range`.

    `x_whole`: x counts something, so its ticks are whole numbers.
    """
    points = [p for line in lines for p in line.points]
    if not points:
        return ""
    ys = [y for _, y in points] + [y for line in lines for _, low, high in line.band for y in (low, high)]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 6, whole=x_whole)
    covered = [*ys, *(y_range or ())]
    y_ticks = ticks(min(covered), max(covered), 6)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{up:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">']
    for y in y_ticks:
        at = place(x_low, y).split(",")[1]
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{at}" dy="0.32em" text-anchor="end">{tick_text(y, y_ticks)}</text>'
        )
    floor = HEIGHT - BOTTOM
    for x in (t for t in x_ticks if x_low <= t <= x_high):
        at = place(x, y_low).split(",")[0]
        parts.append(f'<path class="axis" d="M{at} {floor}v4"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{floor + 16}" text-anchor="middle">{tick_text(x, x_ticks)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for line in lines:
        parts.extend(_curve(line, place, x_label))
    return "".join(parts) + "</svg>"


def _curve(line: Line, place: object, x_label: str) -> Iterable[str]:
    assert callable(place)
    colour = f"c{line.colour % COLOURS}"
    points = sorted(line.points)
    if len(line.band) > 1:
        upper = [place(x, high) for x, _, high in sorted(line.band)]
        lower = [place(x, low) for x, low, _ in sorted(line.band, reverse=True)]
        yield f'<polygon class="band {colour}" points="{" ".join(upper + lower)}"/>'
    elif line.band:
        (x, low, high) = line.band[0]
        yield f'<polyline class="line {colour}" points="{place(x, low)} {place(x, high)}"/>'
    averaged = line.smooth and len(points) > 12
    if averaged:
        yield f'<polyline class="faint {colour}" points="{" ".join(place(*p) for p in points)}"/>'
    style = "line dashed" if line.dashed else "line"
    drawn = moving_average(points) if averaged else points
    yield f'<polyline class="{style} {colour}" points="{" ".join(place(*p) for p in drawn)}"/>'
    if len(points) <= 100 and not line.dashed:
        dot, radius = ("dot faintdot", 1.6) if averaged else ("dot", 2.4)
        for x, y in points:
            across, up = place(x, y).split(",")
            title = escape(f"{line.label}, {x_label} {x:g}: {y:.4g}")
            yield f'<circle class="{dot} {colour}" cx="{across}" cy="{up}" r="{radius}"><title>{title}</title></circle>'


def moving_average(points: Sequence[Point]) -> list[Point]:
    """Each point with the mean of those around it: a tenth of the run, at least 5 points, fewer at the ends."""
    half = max(5, len(points) // 10) // 2
    out = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that cover low to high; `whole`: no fractions."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low, high + pad) if low == 0 else (low - pad, high + pad)
    raw = (high - low) / max(1, about - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float, among: Sequence[float]) -> str:
    """`value` with as many decimals as the distance of the ticks needs, in powers of ten where that is shorter."""
    largest = max(abs(t) for t in among)
    step = among[1] - among[0] if len(among) > 1 else largest or 1.0
    if value == 0:
        return "0"
    if largest < 1e-3 or largest >= 1e6:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}"
