"""The run folder, its survival without room, trackers, progress, the report page and the model card."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from selftaught.errors import UserError
from selftaught.report import Progress, ReportConfig, RunFolder, Trackers, duration, model_card, versions
from selftaught.report.curves import write_curves
from selftaught.report.html import write_report
from selftaught.report.read import read_run, read_samples
from selftaught.report.svg import Line, line_chart, moving_average, tick_text, ticks
from selftaught.report.words import headline, measure_rows, named, result_sentence

RUN = {"model": "quickstart", "data": {"source": "gym:chain_sum"}, "method": {"name": "rlsd"}, "seed": 0,
       "optim": {"steps": 3, "learning_rate": 5e-6}}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(value: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, **more}


def results(after: float = 0.6, change: tuple[float, float, float] = (0.45, 0.4, 0.5)) -> dict[str, Any]:
    side = {"distinct_answers": measure(4.0, 3.5, 4.5), "problems": 256, "status": {"right": 3, "wrong": 1}}
    gain = measure(*change, p=0.0001, better=200, worse=10, same=46, before=0.15, after=after)
    return {
        "before": {"pass@1": measure(0.15, 0.12, 0.18), "pass@8": measure(0.48, 0.4, 0.5), **side},
        "after": {"pass@1": measure(after, 0.567, 0.633), "pass@8": measure(0.69, 0.6, 0.7), **side},
        "difference": {"pass@1": gain, "problems": 256},
        "controls": {"other_prompt": {"pass@1": measure(0.043, 0.03, 0.06)},
                     "teacher/right": {"pass@1": measure(0.912, 0.9, 0.93)}},
        "best_constant": {"value": 0.0625, "answer": "12"},
        "seconds": {"train": 400.0, "eval": 100.0},
    }  # fmt: skip


def filled(path: Path, **more: Any) -> RunFolder:
    folder = RunFolder(path)
    folder.write_run({**RUN, **more})
    folder.write_versions({"torch": "2.0"})
    for step in range(4):
        accuracy = {"eval/pass@1": 0.2, "eval/pass@1_low": 0.15, "eval/pass@1_high": 0.25} if step % 3 == 0 else {}
        folder.log(step, {"reward": 0.1 * step, "entropy": 0.5, "my_own_metric": step, **accuracy})
    rows = [
        {"problem": f"p{p}", "sample": s, "prompt": f"Q: 1+1\nA: 2\nQ: {p} & <b>?\nA:", "response": f"r{step}-{p}",
         "score": 1.0, "status": "right" if step else "wrong", "answer": "7", "tokens": 3, "finish": "stop",
         "step": step, "arm": arm, "reference": "7"}
        for step in (0, 3) for p in range(25) for s in range(2) for arm in ("student", "other_prompt")
    ]  # fmt: skip
    folder.completions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.write_results(results())
    return folder


def test_a_folder_that_holds_a_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").write_run(RUN)
    with pytest.raises(UserError, match=r"already holds a run; add --resume"):
        RunFolder(tmp_path / "run")
    RunFolder(tmp_path / "run", resume=True).write_run(RUN)


def test_a_foreign_folder_and_a_file_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"thesis\.tex"):
            RunFolder(tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match=r"cannot be written"):
        RunFolder(tmp_path / "thesis.tex" / "below")


def test_resuming_with_a_changed_recipe_names_the_key_and_both_values(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_run(RUN)
    folder = RunFolder(tmp_path, resume=True)
    changed = {**RUN, "optim": {"steps": 9, "learning_rate": 5e-6}}
    with pytest.raises(UserError, match=r"optim\.steps = 9.*begun with 3"):
        folder.write_run(changed)
    folder.write_run(changed, may_change=["optim.steps"])
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == changed


def test_other_versions_at_resume_are_told_and_the_first_kept(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path, warn=said.append)
    for _ in range(2):
        folder.write_versions({"torch": "2.0", "python": "3.11"})
    assert said == []
    folder.write_versions({"torch": "2.1", "python": "3.11"})
    assert len(said) == 1 and "torch 2.0 -> 2.1" in said[0]
    assert json.loads((tmp_path / "versions.json").read_text())["torch"] == "2.0"


def test_versions_name_the_software_and_the_processor() -> None:
    found = versions()
    assert found["torch"] and found["python"] == ".".join(map(str, sys.version_info[:3])) and found["cpu"]
    json.dumps(found)


def test_a_logged_line_is_plain_json_whatever_the_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log(1, {"loss": torch.tensor(0.5), "reward": np.float32(0.25), "grad_norm": math.nan, "n": 3})
    assert lines(folder.metrics) == [{"step": 1, "loss": 0.5, "reward": 0.25, "grad_norm": None, "n": 3}]


def test_truncating_leaves_what_an_uninterrupted_run_had_at_that_step(tmp_path: Path) -> None:
    def log(folder: RunFolder, steps: range) -> None:
        for step in steps:
            folder.log(step, {"reward": step / 7})
            folder.log_rollouts(step, [{"response": f"é{step}\u2028", "step": step}])
            with folder.completions.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"problem": "p", "step": step}) + "\n")

    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    log(whole, range(12))
    log(killed, range(11))
    with killed.metrics.open("a") as file:
        file.write('{"step": 11, "rew')
    killed.truncate(8)
    assert [line["step"] for line in lines(killed.metrics)] == list(range(9))
    assert sorted(p.name for p in killed.rollouts.iterdir()) == [f"step-{i}.jsonl" for i in range(9)]
    log(killed, range(9, 12))
    for name in ("metrics.jsonl", "completions.jsonl", "rollouts/step-10.jsonl"):
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize("code", [28, 30, 122])
def test_no_room_is_said_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path, warn=said.append)
    folder.log(1, {"reward": 0.1})

    def full(descriptor: int) -> None:
        raise OSError(code, "no room")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        folder.log(2, {"reward": 0.2})
        folder.log_rollouts(2, [{"response": "x"}])
        folder.write_results({})
        with folder.surviving("completions.jsonl"), folder.completions.open("a") as file:
            file.write("half a ro")
            file.flush()
            full(0)
    folder.log(3, {"reward": 0.3})
    assert len(said) == 1 and "no room" in said[0] and "goes on" in said[0]
    assert folder.lost == 4
    assert [line["step"] for line in lines(folder.metrics)] == [1, 3]
    assert folder.completions.read_text() == "" and list(folder.rollouts.iterdir()) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_report_or_a_subfolder_without_room_is_survived_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = filled(tmp_path / "demo")
    folder._warn = said.append

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    (folder.path / "final").mkdir()
    with folder.surviving("final"):
        (folder.path / "final" / "half").write_text("x")
        full()
    monkeypatch.setattr(Path, "write_text", full)
    with folder.surviving("report.html"):
        write_report([folder.path], folder.path / "report.html")
    assert folder.lost == 2 and len(said) == 1


def test_other_write_errors_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="broken"), RunFolder(tmp_path).surviving("metrics.jsonl"):
        raise OSError(5, "broken")


def test_tensorboard_holds_the_finite_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(ReportConfig(), tmp_path, "run")
    trackers.log(1, {"reward": 0.5, "loss": math.inf, "name": "x"})
    trackers.log(2, {"reward": 0.75})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 0.75)]


def test_missing_tensorboard_is_refused_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"report\.to: tensorboard.*selftaught\[trackers\]"):
        Trackers(ReportConfig(to=("tensorboard",)), tmp_path, "run")
    said: list[str] = []
    trackers = Trackers(ReportConfig(), tmp_path, "run", warn=said.append)
    trackers.log(1, {"reward": 0.5})
    assert len(said) == 1 and "not installed" in said[0]


def test_a_tracker_that_cannot_be_opened_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder must be")
    said: list[str] = []
    trackers = Trackers(ReportConfig(), tmp_path, "run", warn=said.append)
    trackers.log(1, {"reward": 0.5})
    trackers.close()
    assert len(said) == 1 and "tensorboard could not be opened" in said[0]


def test_wandb_goes_offline_and_a_failing_tracker_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def init(*, mode: str = "online", **settings: Any) -> SimpleNamespace:
        asked.append(mode)
        if mode == "online":
            raise RuntimeError("api key not configured")
        return SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)

    def refuse(*args: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **_: None, log=refuse, finish=refuse))
    said: list[str] = []
    trackers = Trackers(ReportConfig(to=("wandb", "trackio")), tmp_path, "run", warn=said.append)
    for step in (1, 2):
        trackers.log(step, {"reward": 0.5})
    trackers.close()
    assert asked == ["online", "offline"]
    assert logged == [(1, {"reward": 0.5}), (2, {"reward": 0.5})]
    assert len(said) == 1 and "trackio stopped" in said[0]


def shown(use: Callable[[Progress], None], *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Progress(40, console) as progress:
        use(progress)
    return out.getvalue()


def test_off_a_terminal_each_step_is_one_line_without_control_characters() -> None:
    def use(progress: Progress) -> None:
        progress.step(1, {"reward": 0.25, "eval/pass@1": 0.146, "tokens_per_second": 310.4, "step_time": 5})
        progress.doing("evaluating")
        progress.step(2, {"reward": 0.5})
        progress.warn("all groups [bold]dead[/bold]")

    said = shown(use, terminal=False).splitlines()
    assert len(said) == 3 and not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(said))
    assert said[0].startswith("step 1/40  reward 0.250  held-out pass@1 0.146  310 tok/s") and "left" in said[0]
    assert "held-out pass@1 0.146" in said[1]  # the latest stays in sight
    assert said[2] == "warning: all groups [bold]dead[/bold]"


def test_on_a_terminal_the_live_line_shows_the_same_facts() -> None:
    def use(progress: Progress) -> None:
        progress.step(3, {"reward": 0.25, "eval/pass@1": 0.146})
        progress.doing("evaluating 5/9")
        progress.say("a line that stays")

    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(use, terminal=True))
    parts = ("step 3/40", "reward 0.250", "held-out pass@1 0.146", "(evaluating 5/9)", "a line that stays")
    assert [part for part in parts if part not in text] == []


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("selftaught.report.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress(40, Console(file=io.StringIO())) as progress:
        assert progress.seconds_left() is None
        progress.step(31, {"step_time": 4.0})  # a resumed run: 30 steps were done before
        assert progress.seconds_left() == pytest.approx(4.0 * 9)
        now[0] = 115.0
        progress.step(33, {})
        assert progress.seconds_left() == pytest.approx(15.0 / 2 * 7)


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (0.4, 59.6, 200, 600, 7500)] == ["0 s", "1 min", "3 min 20 s", "10 min", "2 h 5 min"]


def test_the_sentence_says_rose_fell_or_nothing_by_the_interval() -> None:
    rose = result_sentence(results())
    assert "Held-out pass@1 rose: 0.150 before, 0.600 after" in rose and "+0.450 [+0.400, +0.500]" in rose
    assert "256 problems" in rose and "p < 0.001" in rose
    assert "0.537 above the best constant answer ('12', 0.062)" in rose
    assert "did not change measurably" in result_sentence(results(0.16, (0.01, -0.02, 0.04)))
    fell = result_sentence(results(0.05, (-0.1, -0.15, -0.05)))
    assert "fell" in fell and "−0.100" in fell and "below the best constant" in fell
    few = results(0.2, (0.05, 0.01, 0.09))
    few["difference"]["pass@1"]["p"] = 0.25  # three problems better and none worse: the interval alone says too much
    assert "Held-out pass@1 may have risen" in result_sentence(few)
    equal = {**results(), "best_constant": {"value": 0.6, "answer": "12"}}
    assert "That is no more than the best constant answer ('12', 0.600)" in result_sentence(equal)
    assert "no result yet" in result_sentence({})
    assert result_sentence({"before": results()["before"]}).startswith("Before training, held-out pass@1 is 0.150")


def test_the_table_drops_what_repeats_pass_at_1_and_keeps_what_does_not() -> None:
    same = {"pass@1": measure(0.5, 0.4, 0.6), "maj@1": measure(0.5, 0.4, 0.6), "mean@8": measure(0.5, 0.4, 0.6)}
    partial = {**same, "mean@8": measure(0.7, 0.6, 0.8)}
    assert [row.label for row in measure_rows({"after": same})] == ["pass@1"]
    assert [row.label for row in measure_rows({"after": partial})] == ["pass@1", "mean@8"]
    assert headline({"after": {"pass@16": {}, "pass@8": {}}}) == "pass@8"
    assert [named(x) for x in ("grpo", {"name": "rlsd"}, [{"name": "a"}, "b"], None)] == ["grpo", "rlsd", "a, b", ""]


def test_ticks_cover_the_data_with_round_numbers() -> None:
    assert ticks(0.0, 1.0, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((0.13, 0.61), (-3.0, 17.0), (4e-7, 5e-6), (5.0, 5.0), (0.0, 0.0)):
        found = ticks(low, high, 5)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
    assert ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]
    assert [tick_text(t, [0, 2e-6, 4e-6]) for t in (0, 2e-6)] == ["0", "2e-6"]
    assert [tick_text(t, [0, 0.05, 0.1]) for t in (0.05, 0.1)] == ["0.05", "0.10"]


def test_a_chart_is_well_formed_and_puts_points_where_they_belong() -> None:
    svg = line_chart([Line('a "<b>', [(0, 0.0), (10, 1.0)], [(0, 0.0, 0.2), (10, 0.8, 1.0)])], x_label="step", alt="<>")
    root = ElementTree.fromstring(svg)
    dots = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter("circle")]
    assert dots[0][0] < dots[1][0] and dots[0][1] > dots[1][1]  # up is less in SVG
    assert (dots[0][0], dots[1][0]) == (54.0, 446.0)
    assert len(list(root.iter("polygon"))) == 1
    assert line_chart([Line("a", [])], x_label="step", alt="") == ""
    ElementTree.fromstring(line_chart([Line("a", [(5, 2.0)], [(5, 1.0, 3.0)])], x_label="step", alt=""))
    straight = [(float(i), 2.0 * i) for i in range(30)]
    assert moving_average(straight)[2:-2] == straight[2:-2]


def test_the_page_of_one_run_holds_its_numbers_and_needs_nothing_else(tmp_path: Path) -> None:
    folder = filled(tmp_path / "demo")
    page = write_report([folder.path], folder.path / "report.html").read_text(encoding="utf-8")
    for part in (
        "Held-out pass@1 rose", "0.600 [0.567, 0.633]", "+0.450 [+0.400, +0.500]", "0.480 [0.400, 0.500]",
        "best constant answer (12)", "0.062", "0.043 [0.030, 0.060]", "teacher, right privilege",
        "0.912 [0.900, 0.930]", "rlsd", "gym:chain_sum", "8 min 20 s", "my_own_metric", "learning_rate: 5.0e-06",
        "Held-out accuracy", "Entropy", "3 (75.0%)", "r0-0", "r3-0", "&amp; &lt;b&gt;?",
    ):  # fmt: skip
        assert part in page, part
    assert not re.search(r"<script|https?://|src=|<link|url\(", page)
    assert page.count('class="sample"') == 10
    assert "Q: 1+1" not in page  # the worked example that all prompts share


def test_samples_are_spread_over_the_file_and_pair_the_same_problem(tmp_path: Path) -> None:
    samples = read_samples(filled(tmp_path / "demo").path, 5)
    assert [s.problem for s in samples] == ["p0", "p5", "p10", "p15", "p20"]
    assert all(s.before["step"] == 0 and s.after["step"] == 3 for s in samples)
    assert all(s.before["problem"] == s.after["problem"] and s.after["arm"] == "student" for s in samples)


def test_the_page_of_several_runs_overlays_and_tabulates_them(tmp_path: Path) -> None:
    one, two = filled(tmp_path / "one"), filled(tmp_path / "two", method="grpo")
    page = write_report([one.path, two.path], tmp_path / "both.html").read_text(encoding="utf-8")
    assert "2 runs" in page and "Held-out pass@1" in page
    assert page.count("+0.450\n[+0.400, +0.500]") == 2
    reward = page[page.index("<h3>Reward</h3>") :].partition("</figure>")[0]
    assert 'class="line c0"' in reward and 'class="line c1"' in reward and ">two<" in reward


def test_an_unfinished_run_has_a_page_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "young")
    folder.write_run(RUN)
    page = write_report([folder.path], tmp_path / "a.html").read_text()
    assert "no result yet" in page and "0 of 3" in page
    folder.log(1, {"reward": 0.5})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "rew')
    assert read_run(folder.path).series("reward") == [(1, 0.5)]
    assert "Reward" in write_report([folder.path], tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([filled(tmp_path / "demo").path], tmp_path / "none" / "report.html")


def test_the_picture_is_a_png_and_needs_no_matplotlib_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, picture = filled(tmp_path / "demo"), tmp_path / "curves.png"
    assert write_curves([folder.path], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not write_curves([folder.path], tmp_path / "other.png") and not (tmp_path / "other.png").exists()


def test_the_steps_beneath_a_picture_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, out: drawn.append(figure))
    write_curves([filled(tmp_path / "demo").path], tmp_path / "curves.png")
    for axes in drawn[0].axes:
        axes.set_xlim(1, 3)
        assert {1.0, 2.0, 3.0} <= set(axes.get_xticks()) and all(tick % 1 == 0 for tick in axes.get_xticks())


def test_the_model_card_has_valid_front_matter_results_and_citation() -> None:
    card = model_card({**RUN, "model": "Qwen/Qwen3-1.7B"}, results(), arxiv="2604.03128")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["selftaught", "rlsd"] and front["base_model"] == "Qwen/Qwen3-1.7B"
    for part in ("0.600 [0.567, 0.633]", "from_pretrained", "arxiv.org/abs/2604.03128", "0.062", "0.912"):
        assert part in card
    plain = model_card({**RUN, "model": "/home/me/models/tiny"}, {})
    assert "base_model" not in yaml.safe_load(plain.split("---\n")[1]) and "Citation" not in plain
