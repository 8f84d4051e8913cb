"""curves.png: reward and held-out accuracy as one picture, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selftaught.report.read import RunData, read_run
from selftaught.report.svg import moving_average
from selftaught.report.words import best_constant

COLOURS = ("#1f5fa8", "#c2571a", "#2b8a5f", "#8a4fa3", "#b08a12", "#c23b62", "#4b8f9c")


def write_curves(folders: Sequence[Path | str], out: Path | str) -> bool:
    """Write the picture of one or several runs; False, and no file, without matplotlib."""
    runs = [read_run(folder) for folder in folders]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # No pyplot: a library must not touch the caller's figures or back-end.
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        _reward(left, run, COLOURS[i % len(COLOURS)])
        _accuracy(right, run, i, single=len(runs) == 1)
    left.set(xlabel="step", ylabel="training reward")
    right.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e5e8")
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 1.5
    if right.get_legend_handles_labels()[1]:
        right.legend(frameon=False, fontsize=8)
    figure.savefig(out)
    return True


def _reward(axes: object, run: RunData, colour: str) -> None:
    points = run.series("reward")
    axes.plot(*_xy(points), color=colour, alpha=0.35, linewidth=1)  # type: ignore[attr-defined]
    axes.plot(*_xy(moving_average(points)), color=colour, linewidth=2)  # type: ignore[attr-defined]


def _accuracy(axes: object, run: RunData, index: int, *, single: bool) -> None:
    keys = [k for k in run.keys if k.startswith("eval/pass@") and not k.endswith(("_low", "_high"))]
    for j, key in enumerate(keys if single else keys[:1]):
        colour = COLOURS[(j if single else index) % len(COLOURS)]
        label = key.removeprefix("eval/")
        axes.plot(  # type: ignore[attr-defined]
            *_xy(run.series(key)),
            color=colour,
            marker="o",
            markersize=4,
            label=label if single else f"{run.name} {label}",
        )
        band = run.band(key)
        steps, lows, highs = [b[0] for b in band], [b[1] for b in band], [b[2] for b in band]
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)  # type: ignore[attr-defined]
    constant = best_constant(run.results).get("value")
    if single and constant is not None:
        axes.axhline(constant, color="#7a7f87", linestyle="--", linewidth=1, label="best constant answer")  # type: ignore[attr-defined]


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
