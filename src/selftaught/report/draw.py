"""Pictures drawn: PNG, PDF or SVG by matplotlib where it is installed, and SVG of our own for pages or without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from selftaught.errors import UserError
from selftaught.report.plots import Picture, Range, Series
from selftaught.report.svg import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, tick_text, ticks

# As the page's c0 to c7.
PALETTE = ("#1f5fa8", "#c2571a", "#2b8a5f", "#8a4fa3", "#b08a12", "#c23b62", "#4b8f9c", "#7a7f87")
FILE_STYLE = ("text{font:11.5px sans-serif;fill:#5d646d}.grid{stroke:#dcdfe3;fill:none}.axis{stroke:#5d646d;fill:none}"
              ".line,.whisker{fill:none;stroke:currentColor;stroke-width:2}.dashed{stroke-dasharray:5 5}"
              ".band{fill:currentColor;opacity:.15}.dot{fill:currentColor}.hollow{fill:#fff;stroke:currentColor}")
MARKERS = "osD^vPXd"
FEW = 40  # marks of a line that are still drawn singly
LETTER = 6.2  # width of a letter of a tick's text, in the units of the drawing


@dataclass(frozen=True)
class Axis:
    """One axis: its ends, its ticks, and where a value stands on it between 0 and 1."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log2: bool = False

    def place(self, value: float) -> float:
        at, low, high = (math.log2(v) if self.log2 else v for v in (value, self.low, self.high))
        return (at - low) / (high - low)


def axes_of(picture: Picture) -> tuple[Axis, Axis]:
    """The two axes: they cover every mark, interval and range, and end at round numbers where no ticks are given."""
    marks = [mark for series in picture.series for mark in series.marks]
    xs = [m.x for m in marks] + [bound for m in marks for bound in m.x_range or ()] + [0.0] * picture.x_zero
    ys = [m.y for m in marks] + [bound for m in marks for bound in m.y_range or ()]
    joined = all(series.joined for series in picture.series)
    x = _axis(xs, picture.x_range, picture.x_ticks, picture.x_log2, tight=joined and picture.x_range is None,
              whole=all(float(value).is_integer() for value in xs))
    return x, _axis(ys, picture.y_range, picture.y_ticks, False, tight=False)


def _axis(values: Sequence[float], at_least: Range | None, given: Sequence[tuple[float, str]], log2: bool, *,
          tight: bool, whole: bool = False) -> Axis:
    covered = [*values, *(at_least or ())]
    low, high = min(covered), max(covered)
    if given:
        if low == high:
            low, high = (low / 2, high * 2) if log2 else (low - 1, high + 1)
        return Axis(low, high, tuple(given), log2)
    places = ticks(low, high, 6, whole=whole)
    texts = tuple((t, tick_text(t, places)) for t in places)
    if not tight:
        return Axis(places[0], places[-1], texts)
    low, high = (low - 1, high + 1) if low == high else (low, high)
    return Axis(low, high, tuple((t, text) for t, text in texts if low <= t <= high))


# Inline SVG.


def as_svg(picture: Picture) -> str:
    """The picture as an <svg> with the page's classes; "" where there is nothing to see."""
    if not picture:
        return ""
    x_axis, y_axis = axes_of(picture)
    left = max(LEFT, 14 + LETTER * max((len(text) for _, text in picture.y_ticks), default=0))
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x_axis.place(x) * (right - left), floor - y_axis.place(y) * (floor - TOP)

    alt = f"{picture.title}: {', '.join(series.label for series in picture.series)}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">']
    for y, text in y_axis.ticks:
        _, at = place(x_axis.low, y)
        parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{left - 7:.1f}" y="{at:.1f}" dy="0.32em" text-anchor="end">'
                     f"{escape(text)}</text>")
    shown = _thinned(x_axis, right - left)
    for x, text in shown:
        at, _ = place(x, y_axis.low)
        anchor = "middle" if picture.x_ticks == () or len(text) < 8 else "start" if x == x_axis.low else (
            "end" if x == x_axis.high else "middle")
        parts.append(f'<path class="axis" d="M{at:.1f} {floor}v4"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{floor + 16}" text-anchor="{anchor}">{escape(text)}</text>')
    if picture.x_zero:
        zero, _ = place(0.0, y_axis.low)
        parts.append(f'<path class="axis" d="M{zero:.1f} {TOP}V{floor}"/>')
    parts.append(f'<path class="axis" d="M{left:.1f} {floor}H{right}"/>')
    parts.append(f'<text class="label" x="{(left + right) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">'
                 f"{escape(picture.x_label)}</text>")
    for series in picture.series:
        parts.extend(_svg_series(series, place))
    return "".join(parts) + "</svg>"


def _svg_series(series: Series, place: Callable[[float, float], tuple[float, float]]) -> Iterator[str]:
    colour = f"c{series.colour % COLOURS}"
    bounds = [(mark.x, *mark.y_range) for mark in series.marks if mark.y_range and not mark.x_range]
    band = series.joined and len(bounds) == len(series.marks) > 1
    if band:
        edge = [place(x, high) for x, _, high in bounds] + [place(x, low) for x, low, _ in reversed(bounds)]
        yield f'<polygon class="band {colour}" points="{_pairs(edge)}"/>'
    if series.joined and len(series.marks) > 1:
        style = "line dashed" if series.dashed else "line"
        yield f'<polyline class="{style} {colour}" points="{_pairs(place(m.x, m.y) for m in series.marks)}"/>'
    for mark in series.marks if len(series.marks) <= FEW else ():
        if mark.x_range:
            yield f'<polyline class="whisker {colour}" points="{_pairs(place(x, mark.y) for x in mark.x_range)}"/>'
        if mark.y_range and not band:
            yield f'<polyline class="whisker {colour}" points="{_pairs(place(mark.x, y) for y in mark.y_range)}"/>'
        across, up = place(mark.x, mark.y)
        said = escape(f"{series.label}: {mark.x:.4g}, {mark.y:.4g}")
        radius = 2.6 if series.joined else 3.6
        kind = "hollow" if series.path and mark is series.marks[0] else "dot"
        yield (f'<circle class="{kind} {colour}" cx="{across:.1f}" cy="{up:.1f}" r="{radius}">'
               f"<title>{said}</title></circle>")


def _pairs(points: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _thinned(axis: Axis, width: float) -> list[tuple[float, str]]:
    """The ticks whose texts do not run into the one before."""
    kept: list[tuple[float, str]] = []
    for at, text in axis.ticks:
        room = (axis.place(at) - axis.place(kept[-1][0])) * width if kept else math.inf
        if room >= LETTER * (len(text) + (len(kept[-1][1]) if kept else 0)) / 2 + 6:
            kept.append((at, text))
    return kept


def alone(picture: Picture) -> str:
    """The picture as an SVG file of its own: with its colours and the names of its series, on white."""
    style = "".join(f".c{place}{{color:{colour}}}" for place, colour in enumerate(PALETTE)) + FILE_STYLE
    names = [f'<text class="c{series.colour % COLOURS}" x="60" y="{HEIGHT + 14 + 15 * place}" '
             f'style="fill:currentColor">{escape(series.label)}</text>' for place, series in enumerate(picture.series)]
    height = HEIGHT + 20 + 15 * len(names)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">'
    _, _, drawn = as_svg(picture).partition(">")
    back = f'<style>{style}</style><rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    return f"{head}{back}{drawn.removesuffix('</svg>')}{''.join(names)}</svg>"


# Files.


def save(pictures: Sequence[Picture], path: Path | str, *, columns: int = 3) -> bool:
    """Draw the pictures as panels of one file (.png, .pdf or .svg); False, and no file, without matplotlib.

    One legend stands under all panels where they show the same series, else one in each. Raises UserError where the
    file cannot be written.
    """
    shown = [picture for picture in pictures if picture]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not shown:
        raise UserError(f"{path}: there is nothing to draw; the measures of these pictures are missing")
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    # No pyplot: a library must not touch the caller's figures or back-end.
    figure = Figure(figsize=(5.0 * columns + 0.4, 3.6 * rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, picture in zip(grid, shown, strict=False):
        _panel(axes, picture)
    for axes in grid[len(shown):]:
        axes.set_axis_off()
    labels = [tuple(series.label for series in picture.series) for picture in shown]
    if len(set(labels)) == 1 and len(shown) > 1:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(labels[0])),
                      frameon=False, fontsize=9)
    else:
        for axes, names in zip(grid, labels, strict=False):
            if len(names) > 1:
                axes.legend(frameon=False, fontsize=8.5)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from error
    return True


def _panel(axes: Any, picture: Picture) -> None:
    x_axis, y_axis = axes_of(picture)
    if picture.x_log2:
        axes.set_xscale("log", base=2)
    for series in picture.series:
        _drawn(axes, series)
    if picture.x_zero:
        axes.axvline(0.0, color="#5d646d", linewidth=1)
    if picture.x_ticks:
        axes.set_xticks([at for at, _ in picture.x_ticks], [text for _, text in picture.x_ticks])
        axes.minorticks_off()
    if picture.y_ticks:
        axes.set_yticks([at for at, _ in picture.y_ticks], [text for _, text in picture.y_ticks])
    pad = 0.0 if picture.x_log2 else 0.02 * (x_axis.high - x_axis.low)
    axes.set(ylim=(y_axis.low, y_axis.high), xlabel=picture.x_label, ylabel=picture.y_label)
    axes.set_xlim((x_axis.low / 1.06, x_axis.high * 1.06) if picture.x_log2 else (x_axis.low - pad, x_axis.high + pad))
    axes.set_title(picture.title, fontsize=10.5, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e5e8")
    axes.set_axisbelow(True)
    if max((len(text) for _, text in picture.x_ticks), default=0) > 6:
        for label in axes.get_xticklabels():
            label.set(rotation=20, rotation_mode="anchor", horizontalalignment="right")


def _drawn(axes: Any, series: Series) -> None:
    colour = PALETTE[series.colour % len(PALETTE)]
    xs, ys = [m.x for m in series.marks], [m.y for m in series.marks]
    marker = MARKERS[series.colour % len(MARKERS)] if len(xs) <= FEW else None
    banded = series.joined and len(xs) > 1 and all(m.y_range and not m.x_range for m in series.marks)
    if banded:
        lows, highs = zip(*(m.y_range for m in series.marks if m.y_range), strict=True)
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    for mark in series.marks:
        if mark.x_range:
            axes.plot(mark.x_range, (mark.y, mark.y), color=colour, linewidth=1.4)
        if mark.y_range and not banded:
            axes.plot((mark.x, mark.x), mark.y_range, color=colour, linewidth=1.4)
    style = ("--" if series.dashed else "-") if series.joined else "none"
    axes.plot(xs, ys, color=colour, linewidth=1.8, linestyle=style, marker=marker, markersize=5, label=series.label,
              clip_on=False, zorder=3)
    if series.path:
        axes.plot(xs[:1], ys[:1], color=colour, marker=marker, markersize=5, markerfacecolor="white", zorder=4)


def write_page(pictures: Sequence[Picture], out: Path | str, *, title: str, intro: str = "") -> Path:
    """One page with all pictures, readable offline. Raises UserError where it cannot be written."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                            lstrip_blocks=True)
    shown = [{"title": p.title, "caption": p.caption, "y_label": p.y_label, "svg": Markup(as_svg(p)),
              "legend": [(s.colour, s.dashed, s.label) for s in p.series]} for p in pictures if p]
    page = templates.get_template("pictures.html.j2").render(title=title, intro=intro, pictures=shown)
    try:
        Path(out).write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another place") from error
    return Path(out)
