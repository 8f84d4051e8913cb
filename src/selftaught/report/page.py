"""A study's page: tables and pictures under headings, offline, without script; and the same pictures as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from selftaught.errors import UserError
from selftaught.report.curves import COLOURS
from selftaught.report.svg import Line, line_chart

GREY = "#7a7f87"


@dataclass(frozen=True)
class Figure:
    """One picture; `name` is unique on its page and names its file. `x_whole`: x counts something."""

    name: str
    title: str
    caption: str
    lines: Sequence[Line]
    x_label: str
    y_range: tuple[float, float] | None = None
    x_whole: bool = False


@dataclass(frozen=True)
class Table:
    """Cells ready to print; the first column names its row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """As lines for a terminal, without the caption."""
        table = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))]
        return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


@dataclass(frozen=True)
class Part:
    """One section of a page."""

    title: str
    text: Sequence[str]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def write_page(out: Path, title: str, lead: Sequence[str], parts: Sequence[Part]) -> Path:
    """Write the page to `out`, with every picture drawn in it; returns it.

    UserError: `out` cannot be written.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    drawn = {figure.name: Markup(line_chart(figure.lines, x_label=figure.x_label, alt=figure.title,
                                            y_range=figure.y_range, x_whole=figure.x_whole))
             for part in parts for figure in part.figures}
    text = templates.get_template("page.html.j2").render(title=title, lead=lead, parts=parts, drawn=drawn)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another place") from error
    return out


def write_pngs(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Each picture as FOLDER/NAME.png; [] and no file without matplotlib (the extra `plots`)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return []
    written = []
    for figure in figures:
        # No pyplot: a library must not touch the caller's figures or back-end.
        canvas = Canvas(figsize=(6.4, 4.4), dpi=150, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        for line in figure.lines:
            _curve(axes, line)
        axes.set_title(figure.title, fontsize=11, loc="left")
        axes.set_xlabel(figure.x_label)
        if figure.y_range is not None:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, figure.y_range[0]), max(high, figure.y_range[1]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e5e8")
        axes.set_axisbelow(True)
        if len(figure.lines) > 1:
            canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        written.append(folder / f"{figure.name}.png")
        canvas.savefig(written[-1])
    return written


def _curve(axes: object, line: Line) -> None:
    colour = (*COLOURS, GREY)[line.colour % (len(COLOURS) + 1)]
    points = sorted(line.points)
    style = {"linestyle": "--", "linewidth": 1.3} if line.dashed else {"linewidth": 1.8}
    if len(points) <= 40 and not line.dashed:
        style |= {"marker": "o", "markersize": 3.5}
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, color=colour, label=line.label, **style)  # type: ignore[attr-defined]
    if line.band:
        steps, lows, highs = zip(*sorted(line.band), strict=True)
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)  # type: ignore[attr-defined]
