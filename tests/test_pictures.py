"""Pictures: what they show of the measures, where marks land, and the files of a run, with matplotlib or not."""

from __future__ import annotations

import itertools
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from own import cli
from selftaught import pictures
from selftaught.errors import UserError
from selftaught.eval import append_rows, summarise
from selftaught.eval.continual import summarise_sequence
from selftaught.eval.diversity import entropy_by_position
from selftaught.report import draw, plots


def measure(value: float | None, half: float = 0.1) -> dict[str, float | None]:
    low, high = (None, None) if value is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high}


LADDER = {"pass@8": measure(0.7), "pass@1": measure(0.2), "pass@64": measure(0.9), "maj@8": measure(0.5),
          "distinct_answers": measure(5.0, 1.0)}  # fmt: skip


def lines_of(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of every polyline or polygon of that class."""
    found = re.findall(rf'class="{kind} c\d" points="([^"]+)"', svg)
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())] for points in found]


def test_pass_at_k_is_sorted_on_a_log_axis_and_leaves_out_what_has_no_value() -> None:
    picture = plots.pass_at_k({"run": {**LADDER, "pass@16": measure(None)}, "none": {"pass@1": measure(None)}})
    (series,) = picture.series
    assert [(m.x, m.y, m.y_range) for m in series.marks] == [
        (1, 0.2, pytest.approx((0.1, 0.3))), (8, 0.7, pytest.approx((0.6, 0.8))), (64, 0.9, pytest.approx((0.8, 1.0)))]
    assert picture.x_ticks == ((1, "1"), (8, "8"), (64, "64")) and picture.y_range == (0.0, 1.0)
    x, y = draw.axes_of(picture)
    assert [x.place(k) for k in (1, 8, 64)] == pytest.approx([0.0, 0.5, 1.0]) and y.place(0.25) == pytest.approx(0.25)
    assert [m.x for m in plots.pass_at_k({"run": LADDER}, "maj").series[0].marks] == [8]
    assert not plots.pass_at_k({}) and draw.as_svg(plots.pass_at_k({})) == ""


def test_diversity_is_joined_from_before_to_after_with_whiskers_in_both_directions() -> None:
    after = {**LADDER, "pass@1": measure(0.6), "distinct_answers": measure(2.0)}
    picture = plots.diversity_accuracy({"one": LADDER, "two": [LADDER, after], "gone": {"pass@1": measure(0.1)}},
                                       "distinct_answers")
    one, two = picture.series
    assert not one.joined and two.joined and two.path and [(m.x, m.y) for m in two.marks] == [(0.2, 5.0), (0.6, 2.0)]
    assert one.marks[0].x_range == pytest.approx((0.1, 0.3)) and one.marks[0].y_range == (4.0, 6.0)
    svg = draw.as_svg(picture)
    assert svg.count('class="hollow c1"') == 1 and len(lines_of(svg, "whisker")) == 6 and lines_of(svg, "band") == []


def test_entropy_stands_at_the_middle_of_each_part() -> None:
    parts = entropy_by_position([[1.0, 0.5, 0.25, 0.75, float("nan")], [3.0, 0.5]])[:3]
    picture = plots.entropy_by_position({"run": parts, "behind": parts}, dashed=["behind"])
    run, behind = picture.series
    assert [(m.x, m.y) for m in run.marks] == [(0.0, 2.0), (1.0, 0.5), (2.5, 0.5)] and behind.dashed
    assert draw.axes_of(picture)[1].low == 0.0
    broken = plots.entropy_by_position({"x": [*parts, {"start": 4, "end": 8, "value": float("nan")}]})
    assert [m.x for m in broken.series[0].marks] == [0, 1, 2.5]


def test_controls_have_a_row_each_and_runs_stand_beside_one_another_in_it() -> None:
    shown = {"true": measure(0.8), "empty": measure(0.0), "wrong": measure(-0.3)}
    picture = plots.leakage_controls({"a": shown, "b": {k: v for k, v in shown.items() if k != "empty"}})
    assert picture.y_ticks == ((2.0, "true"), (1.0, "empty"), (0.0, "wrong"))
    a, b = picture.series
    assert [(m.x, round(m.y)) for m in a.marks] == [(0.8, 2), (0.0, 1), (-0.3, 0)]
    assert [m.x for m in b.marks] == [0.8, -0.3]
    assert all(above.y > below.y for above, below in zip(a.marks[::2], b.marks, strict=True))
    x, y = draw.axes_of(picture)
    assert x.low <= -0.4 and x.high >= 0.9 and (y.low, y.high) == (-0.5, 2.5)
    (alone,) = plots.leakage_controls({"a": shown}).series
    assert [m.y for m in alone.marks] == [2.0, 1.0, 0.0]


def test_a_run_has_one_colour_in_every_picture_and_what_stands_behind_is_grey() -> None:
    runs = {"before": LADDER, "a": LADDER, "b": LADDER}
    behind, *others = plots.pass_at_k(runs, dashed=["before"]).series
    assert (behind.colour, behind.dashed) == (7, True) and [s.colour for s in others] == [0, 1]
    assert [s.colour for s in plots.diversity_accuracy({"a": LADDER, "b": LADDER}, "distinct_answers").series] == [0, 1]


def test_the_sequence_of_tasks_is_drawn_from_its_matrix() -> None:
    values = np.array([[0.0, 1.0, 0.5], [0.2, 0.8, 0.7]])
    found = summarise_sequence({"a": values, "b": values / 2, "far": values / 4}, 2, ["before", "a", "b"], draws=50)
    picture = plots.task_sequence(found)
    assert [[m.y for m in series.marks] for series in picture.series] == [
        pytest.approx(values.mean(0) / scale) for scale in (1, 2, 4)]
    assert [series.dashed for series in picture.series] == [False, False, True]
    assert [text for _, text in picture.x_ticks] == ["before", "a", "b"]


def test_marks_bands_and_ticks_land_in_the_svg_where_the_axes_say() -> None:
    picture = plots.pass_at_k({"run": LADDER})
    svg = draw.as_svg(picture)
    ET.fromstring(svg)
    left, right, floor = draw.LEFT, draw.WIDTH - draw.RIGHT, draw.HEIGHT - draw.BOTTOM
    height = floor - draw.TOP
    (line,) = lines_of(svg, "line")
    assert [x for x, _ in line] == pytest.approx([left, (left + right) / 2, right], abs=0.06)
    assert [y for _, y in line] == pytest.approx([floor - y * height for y in (0.2, 0.7, 0.9)], abs=0.06)
    (band,) = lines_of(svg, "band")
    assert [y for _, y in band] == [pytest.approx(floor - y * height, abs=0.06) for y in (0.3, 0.8, 1.0, 0.8, 0.6, 0.1)]
    ticks = re.findall(r'<text class="tick" x="([\d.]+)" y="\d+" text-anchor="middle">(\d+)</text>', svg)
    assert [(float(x), text) for x, text in ticks] == [
        (pytest.approx(x, abs=0.06), text) for x, text in ((left, "1"), ((left + right) / 2, "8"), (right, "64"))]


def test_steps_are_counted_in_whole_numbers() -> None:
    x, y = draw.axes_of(plots.over_steps({"a": [(0, 0.1), (1, 0.2), (2, 0.3)]}, "loss"))
    assert [text for _, text in x.ticks] == ["0", "1", "2"] and any("." in text for _, text in y.ticks)


def test_texts_that_would_run_into_one_another_are_thinned_and_labels_are_escaped() -> None:
    picture = plots.over_steps({"a<b": [(step, step) for step in range(40)]}, "x & y")
    crowded = plots.replace(picture, x_ticks=tuple((float(x), f"step {x}") for x in range(40)))
    texts = re.findall(r'x="([\d.]+)" y="\d+" text-anchor="\w+">(step \d+)<', draw.as_svg(crowded))
    places = [float(x) for x, _ in texts]
    assert 4 < len(texts) < 12 and min(b - a for a, b in itertools.pairwise(places)) > 40
    ET.fromstring(draw.as_svg(picture))
    assert "a&lt;b" in draw.as_svg(picture)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_panels_are_one_file_by_matplotlib(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = {"a": LADDER, "b": LADDER}
    shown = [plots.pass_at_k(runs), plots.diversity_accuracy(runs, "pass@8")]
    assert draw.save([*shown, plots.pass_at_k({})], tmp_path / f"all.{suffix}")
    head = (tmp_path / f"all.{suffix}").read_bytes()[:300]
    assert {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix] in head
    with pytest.raises(UserError, match="nothing to draw"):
        draw.save([plots.pass_at_k({})], tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot be written"):
        draw.save(shown, tmp_path / "no folder" / "x.png")


# A run's folder.


def run_folder(path: Path, right_after: int, model: str = "m") -> Path:
    path.mkdir(parents=True)
    (path / "run.yaml").write_text(f"model: {model}\nmethod: {{name: grpo}}\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "entropy": 1 / s}) + "\n" for s in (1, 2, 3)))
    for step, right in ((0, 1), (3, right_after)):
        append_rows(path / "completions.jsonl", (
            {"problem": f"p{p}", "sample": n, "score": float(n < c), "status": "right" if n < c else "wrong",
             "answer": str(n), "tokens": 3, "finish": "stop", "step": step, "model": model, "arm": arm}
            for arm, c in (("student", right), ("teacher/right", 4)) for p in range(3) for n in range(4)))  # fmt: skip
    (path / "results.json").write_text(json.dumps({"controls": {"teacher/right": {"pass@1": measure(0.8)},
                                                                "teacher/wrong": {"pass@1": measure(0.1)}}}))
    return path


def test_a_runs_measures_are_those_of_its_first_and_last_evaluation_of_the_student(tmp_path: Path) -> None:
    found = pictures.measured(run_folder(tmp_path / "a", 3), lambda line: None)
    assert [found.before[f"pass@{k}"]["value"] for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert [found.after[f"pass@{k}"]["value"] for k in (1, 2, 4)] == [0.75, 1.0, 1.0]
    path = tmp_path / "a" / "completions.jsonl"  # one problem lost all its samples but one: it shortens no curve
    kept = [line for line in path.read_text().splitlines() if (row := json.loads(line))["problem"] != "p0"
            or row["sample"] == 0]  # fmt: skip
    path.write_text("\n".join(kept) + "\n")
    less = pictures.measured(tmp_path / "a", lambda line: None)
    assert [less.after[f"pass@{k}"]["value"] for k in (1, 2, 4)] == [pytest.approx((1 + 0.75 + 0.75) / 3), 1.0, 1.0]


def test_the_command_draws_one_run_or_several_and_its_page_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a, b = run_folder(tmp_path / "a", 3), run_folder(tmp_path / "b", 2)
    parts = [{"start": 0, "end": 1, "value": 1.0}, {"start": 1, "end": 2, "value": 0.5}]
    side = {"gap/right": measure(0.5), "gap/wrong": measure(0.1), "pcmi": measure(3.0)}
    (a / "measures.json").write_text(json.dumps({
        "leakage": {"before": side, "after": side, "difference": side},
        "diversity": {"before": {"token_entropy_by_position": None}, "after": {"token_entropy_by_position": parts}}}))
    said = cli("report", a, b, "--pictures", "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy-controls.png", "diversity-accuracy.png", "entropy-by-position.png", "entropy.png",
        "leakage-controls.png", "pass-at-k.png", "pictures.html"]  # fmt: skip
    page = (tmp_path / "out" / "pictures.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page and page.count("<svg") == 6
    assert "before training" in page and "<title>a: 1, 0.75</title>" in page and "<title>b: 1, 0.5</title>" in page
    assert cli("report", a, "--pictures").code == 0 and (a / "pictures" / "pass-at-k.png").is_file()
    gaps = pictures.of_runs({"a": pictures.measured(a, print)})[-1]
    assert [text for _, text in gaps.y_ticks] == ["right privilege", "wrong"]
    assert [series.label for series in gaps.series] == ["before training", "after training"]
    other = run_folder(tmp_path / "c", 2, model="another")
    shown = pictures.of_runs({name: pictures.measured(path, print) for name, path in (("a", a), ("c", other))})
    assert [(series.label, series.dashed) for series in shown[0].series] == [
        ("a, before training", True), ("a", False), ("c, before training", True), ("c", False)]  # no common beginning


def test_a_run_that_began_otherwise_has_its_own_beginning_and_unlike_counts_are_not_compared(tmp_path: Path) -> None:
    """One grey curve for all would make a run that rose from less look as if it fell."""
    said = list[str]()
    a, b = run_folder(tmp_path / "a", 3), run_folder(tmp_path / "b", 2)
    rows = [json.loads(line) for line in (b / "completions.jsonl").read_text().splitlines()]
    fewer = [row for row in rows if row["sample"] < 2]
    (b / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fewer))
    shown = pictures.of_runs({path.name: pictures.measured(path, said.append) for path in (a, b)})
    labels = [series.label for series in shown[0].series]
    assert labels == ["a, before training", "a", "b, before training", "b"]
    assert not shown[1]
    pictures.write_pictures([a, b], tmp_path / "out", said.append)
    assert any("among 2, 4 responses" in line for line in said)


def test_without_matplotlib_the_files_are_svg_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    page = pictures.write_pictures([run_folder(tmp_path / "a", 3)], tmp_path / "out", print)
    assert page.is_file() and not list((tmp_path / "out").glob("*.png"))
    svg = ET.parse(tmp_path / "out" / "pass-at-k.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "before training" in texts and "after training" in texts


def test_what_holds_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = cli("report", tmp_path / "empty", "--pictures")
    assert said.code == 2 and "is no run folder" in said.err
    (tmp_path / "empty" / "run.yaml").write_text("model: m\n")
    said = cli("report", tmp_path / "empty", "--pictures")
    assert said.code == 2 and "no evaluation to draw" in said.err
    a: Any = run_folder(tmp_path / "a", 3)
    (a / "measures.json").write_text("{")
    assert "measures.json is not JSON" in cli("report", a, "--pictures").err


def test_a_summary_of_real_rows_is_drawn_as_it_stands() -> None:
    rows = [{"problem": p, "sample": n, "score": float((p + n) % 2), "status": None, "answer": str(n % 3), "tokens": 1,
             "finish": "stop"} for p in range(4) for n in range(8)]
    summary = summarise(rows, [1, 2, 4, 8])
    marks = plots.pass_at_k({"x": summary}).series[0].marks
    assert [m.y for m in marks] == [summary[f"pass@{k}"]["value"] for k in (1, 2, 4, 8)]
