"""What a picture shows, apart from how it is drawn: pure functions from measures to pictures.

A measure is {value, low, high}, as every summary has it; one without a value is left out. Names become labels. The
same picture is drawn by matplotlib into a file and as inline SVG into a page (`report/draw.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Measure = Mapping[str, Any]
Range = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One point, with an interval in either direction where there is one."""

    x: float
    y: float
    x_range: Range | None = None
    y_range: Range | None = None


@dataclass(frozen=True)
class Series:
    """Marks of one name. `joined`: a line, with a band for its intervals; else single marks with whiskers.

    `path`: a line that leads from its first mark, which is hollow, to its last.
    """

    label: str
    marks: tuple[Mark, ...]
    colour: int = 0
    joined: bool = True
    dashed: bool = False
    path: bool = False


@dataclass(frozen=True)
class Picture:
    """One pair of axes. `name` is the file's stem; ticks are (place, text), and by default round numbers."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()
    x_range: Range | None = None  # covered at least
    y_range: Range | None = None
    x_log2: bool = False
    x_zero: bool = False  # a line at x = 0

    def __bool__(self) -> bool:
        """Is there anything to see?"""
        return bool(self.series)


def pass_at_k(runs: Mapping[str, Mapping[str, Any]], measure: str = "pass", dashed: Sequence[str] = ()) -> Picture:
    """The ladder of pass@k (or of another `measure`, such as maj) of each run, over k on a log axis, with bands."""
    lines = {}
    for name, summary in runs.items():
        at = {int(key.partition("@")[2]): value for key, value in summary.items() if key.startswith(f"{measure}@")}
        lines[name] = [(k, *_values(at[k])) for k in sorted(at)]
    picture = _lines("pass-at-k" if measure == "pass" else f"{measure}-at-k", f"{measure}@k", lines, "k",
                     f"{measure}@k on held-out problems", dashed)
    seen = sorted({int(mark.x) for series in picture.series for mark in series.marks})
    return replace(picture, x_ticks=tuple((k, str(k)) for k in seen), x_log2=True, y_range=(0.0, 1.0),
                   caption="Unbiased over all choices of k samples; bands are 95 % bootstrap intervals over problems. "
                   "A flat line has one answer left to each problem.")


def diversity_accuracy(runs: Mapping[str, Any], diversity: str, accuracy: str = "pass@1",
                       label: str | None = None) -> Picture:
    """Diversity against accuracy: one mark with whiskers for each run.

    A run is a summary, or several of them (before, after), which are then joined in their order.
    """
    series: list[Series] = []
    for name, given in runs.items():
        marks = []
        for summary in (given,) if isinstance(given, Mapping) else given:
            x, x_range = _point(summary.get(accuracy))
            y, y_range = _point(summary.get(diversity))
            if x is not None and y is not None:
                marks.append(Mark(x, y, x_range, y_range))
        if marks:
            series.append(Series(name, tuple(marks), len(series), joined=len(marks) > 1, path=len(marks) > 1))
    words = label or diversity.replace("_", " ")
    return Picture("diversity-accuracy", f"{words} against {accuracy}".capitalize(),
                   "To the right: more often right. Up: more different answers. Whiskers are 95 % intervals; a line "
                   "leads from before training (hollow) to after.", accuracy, words, tuple(series))


def entropy_by_position(runs: Mapping[str, Iterable[Mapping[str, Any]]], dashed: Sequence[str] = ()) -> Picture:
    """Mean entropy by position, of the parts {start, end, value} of `eval.entropy_by_position`, each at its middle."""
    lines = {name: [((part["start"] + part["end"] - 1) / 2, part["value"]) for part in parts]
             for name, parts in runs.items()}  # fmt: skip
    return _lines("entropy-by-position", "Token entropy by position", lines, "token of the response",
                  "entropy, nats", dashed, y_range=(0.0, 0.0),
                  caption="Mean over the tokens at these positions, a dot for each part. Entropy is no diversity: many "
                  "words for one answer have it.")


def over_steps(runs: Mapping[str, Iterable[Sequence[float | None]]], y_label: str, *, name: str | None = None,
               title: str | None = None, caption: str = "", x_label: str = "step", dashed: Sequence[str] = (),
               y_range: Range | None = None) -> Picture:
    """Any curves: (x, value) or (x, value, low, high) of each run."""
    stem = name or "".join(letter if letter.isalnum() else "-" for letter in y_label)
    return _lines(stem, title or y_label.capitalize(), runs, x_label, y_label, dashed, caption, y_range)


def leakage_controls(runs: Mapping[str, Mapping[str, Any]], x_label: str = "mean log T(y) − log S(y), nats per token",
                     title: str = "What the teacher's view adds, by what it was shown") -> Picture:
    """One row for each control (true, empty, wrong, ...), in it one mark with whiskers for each run.

    The distance of true from wrong is the part that knows the answer; that of wrong from zero is mere form.
    """
    kinds = list(dict.fromkeys(kind for controls in runs.values() for kind in controls))
    series: list[Series] = []
    for place, (name, controls) in enumerate(runs.items()):
        off = 0.0 if len(runs) == 1 else 0.5 * (0.5 - place / (len(runs) - 1))
        marks = []
        for row, kind in enumerate(kinds):
            x, x_range = _point(controls.get(kind))
            if x is not None:
                marks.append(Mark(x, len(kinds) - 1 - row + off, x_range))
        if marks:
            series.append(Series(name, tuple(marks), place, joined=False))
    ticks = tuple((float(len(kinds) - 1 - row), kind) for row, kind in enumerate(kinds))
    return Picture("leakage-controls", title, "Whiskers are 95 % intervals. What true adds over wrong knows the "
                   "answer; what wrong adds over nothing is form.", x_label, "", tuple(series), y_ticks=ticks,
                   y_range=(-0.5, len(kinds) - 0.5), x_zero=True)


def task_sequence(found: Mapping[str, Any]) -> Picture:
    """Accuracy on each task after each checkpoint, as `summarise_sequence` has it; dashed: never trained on."""
    lines = {}
    for place, task in enumerate(found["tasks"]):
        lines[task] = [(float(c), *_values(row[place])) for c, row in enumerate(found["matrix"])]
    picture = _lines("task-sequence", "Accuracy on each task after each was learned", lines, "", "accuracy",
                     found["tasks"][found["learned"]:], "Bands are 95 % bootstrap intervals over the problems of a "
                     "task. Dashed: never trained on.", (0.0, 1.0))
    return replace(picture, x_ticks=tuple((float(c), name) for c, name in enumerate(found["checkpoints"])))


def _lines(name: str, title: str, lines: Mapping[str, Iterable[Sequence[Any]]], x_label: str, y_label: str,
           dashed: Sequence[str] = (), caption: str = "", y_range: Range | None = None) -> Picture:
    """A picture of curves from (x, value) or (x, value, low, high); values that are no numbers are left out.

    Dashed ones take their colours from the palette's grey end, so that the others have the same in every picture.
    """
    series: list[Series] = []
    for label, points in lines.items():
        behind = sum(one.dashed for one in series)
        place = 7 - behind if label in dashed else len(series) - behind
        marks = []
        for x, *values in points:
            y, bounds = _point(dict(zip(("value", "low", "high"), values, strict=False)))
            if y is not None:
                marks.append(Mark(float(x), y, None, bounds))
        if marks:
            series.append(Series(label, tuple(sorted(marks, key=lambda mark: mark.x)), place, dashed=label in dashed))
    return Picture(name, title, caption, x_label, y_label, tuple(series), y_range=y_range)


def _values(measure: Measure | None) -> tuple[Any, Any, Any]:
    found = measure or {}
    return found.get("value"), found.get("low"), found.get("high")


def _point(measure: Measure | None) -> tuple[float | None, Range | None]:
    """A measure's value and interval as plain numbers; None for what it has not."""
    value, low, high = (None if v is None or not math.isfinite(v) else float(v) for v in _values(measure))
    return value, None if low is None or high is None else (low, high)
