"""The study of concept graphs as a command: its smoke run takes a real step in every arm, and resumes part by part."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from own import cli
from selftaught.errors import UserError
from selftaught.eval import read_rows
from selftaught.studies.graphs import page, study
from selftaught.studies.graphs.arms import ARMS
from selftaught.studies.graphs.measures import measure

QUICK = ("report.html=false", "eval.controls=false", "report.to=[]")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run of all arms."""
    out = tmp_path_factory.mktemp("study")
    study.run(out, lambda text: None, only=tuple(ARMS), seeds=(0,), smoke=True, overrides=QUICK)
    return out


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_of_the_smoke_run_takes_a_real_step(name: str, smoke: Path) -> None:
    steps = [json.loads(line) for line in (smoke / f"{name}-0" / "metrics.jsonl").read_text().splitlines()]
    taken = [step for step in steps if "grad_norm" in step]
    assert len(taken) == 2 and all(step["grad_norm"] > 0 and step["reward"] > 0 for step in taken)
    before, after = (load_file(smoke / part / "model.safetensors") for part in ("base/model", f"{name}-0/final"))
    assert all(not before[key].equal(after[key]) for key in before if before[key].ndim == 2)
    if not name.startswith("grpo"):
        assert all(step["privilege/missing"] < 1 for step in taken)
    teachers = [step.get("privilege/teachers", 1.0) for step in taken]
    assert (max(teachers) > 1) == (name in ("sdsd-mixture", "sdsd-average", "sdsd-different"))


def test_arms_differ_by_their_own_update_alone(smoke: Path) -> None:
    """All begin with the same rollouts; no two end with the same weights."""
    ends = {name: load_file(smoke / f"{name}-0" / "final" / "model.safetensors") for name in ARMS}
    first = {name: (smoke / f"{name}-0" / "rollouts" / "step-1.jsonl").read_text() for name in ARMS}
    texts = {tuple(re.findall(r'"response": "([^"]*)"', text)) for text in first.values()}
    assert len(texts) == 1
    key = "model.embed_tokens.weight"
    names = list(ARMS)
    same = {(a, b) for a in names for b in names if a < b and ends[a][key].equal(ends[b][key])}
    assert same == set()


def test_tables_and_page_say_what_the_completions_say(smoke: Path) -> None:
    table, html = (smoke / "table.md").read_text(), (smoke / "page.html").read_text()
    measures = json.loads((smoke / "measures.json").read_text())
    assert [*measures] == ["base", *ARMS]
    for name in ("grpo", "sdsd"):
        for one in ("in", "larger-5", "harder", "harder-random"):
            rows = read_rows(smoke / f"{name}-0" / "tests" / f"{one}.jsonl")
            assert len(rows) == 6 * 4 and {row["step"] for row in rows} == {2}
            assert measures[name]["0"][one] == measure(rows)
    found = measures["sdsd"]["0"]["in"]
    row = next(line for line in table.splitlines() if line.startswith("| sdsd |"))
    assert row.split(" | ")[1:3] == [f"{found['pass@1']:.3f}", f"{found['pass@4']:.3f}"]
    claimed = [line for line in table.splitlines() if line.startswith("| SDSD uses fewer concepts")]
    assert len(claimed) == 1 and "sdpo: pass@1 not below" in table and "### token entropy" in table
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert [base64.b64decode(image) for image in images] == [
        (smoke / f"{name}.png").read_bytes() for name in ("passk", "training", "tradeoff")]
    assert "http" not in html.replace("http-equiv", "")


def test_what_is_done_is_not_done_again_and_what_is_missing_is(smoke: Path) -> None:
    kept = smoke / "sdsd-0" / "final" / "model.safetensors"
    torn = smoke / "grpo-0" / "tests" / "harder.jsonl"
    before, rows, made = torn.read_bytes(), (smoke / "table.md").read_text(), kept.stat().st_mtime_ns
    other = (smoke / "grpo-0" / "tests" / "in.jsonl").stat().st_mtime_ns
    torn.rename(torn.with_suffix(".part"))
    study.run(smoke, lambda text: None, only=tuple(ARMS), seeds=(0,), smoke=True, overrides=QUICK)
    assert torn.read_bytes() == before and not torn.with_suffix(".part").exists()
    assert kept.stat().st_mtime_ns == made and (smoke / "table.md").read_text() == rows
    assert (smoke / "grpo-0" / "tests" / "in.jsonl").stat().st_mtime_ns == other


def test_a_stopped_arm_goes_on_from_its_checkpoint_to_the_same_weights(smoke: Path) -> None:
    folder = smoke / "sdsd-mixture-0"
    final = (folder / "final" / "model.safetensors").read_bytes()
    for lost in ("results.json", "checkpoints/step-2"):
        path = folder / lost
        path.rename(path.with_name(f"gone-{path.name}"))
    if not (folder / "checkpoints" / "step-1").is_dir():
        pytest.fail("the smoke run keeps no earlier checkpoint")
    said: list[str] = []
    study.run(smoke, said.append, only=("sdsd-mixture",), seeds=(0,), smoke=True, overrides=QUICK)
    assert (folder / "final" / "model.safetensors").read_bytes() == final
    assert "resumed after step 1" in (smoke / "sdsd-mixture-0.log").read_text()


def test_failed_parts_are_named_and_what_is_done_stands_in_the_table(
        smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: study.Job, console: object) -> None:
        raise UserError("no room")

    monkeypatch.setattr(study, "do", fails)
    with pytest.raises(UserError, match=r"2 of 2 parts failed \(base: no room; grpo-7: no room") as told:
        study.run(smoke, lambda text: None, only=("grpo",), seeds=(7,), smoke=True, overrides=QUICK)
    assert "table.md" in str(told.value) and "| base |" in (smoke / "table.md").read_text()


def test_a_part_that_was_stopped_between_two_sets_leaves_the_others_their_table(
        smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (smoke / "table.md").read_text()
    lost = smoke / "sdsd-0" / "tests" / "harder.jsonl"
    kept = lost.rename(lost.with_suffix(".kept"))
    monkeypatch.setattr(study, "do", lambda job, console: None)
    study.run(smoke, lambda text: None, only=("rlsd",), seeds=(0,), smoke=True, overrides=QUICK)
    table = (smoke / "table.md").read_text()
    assert "| sdsd |" in table and "solves fewer of the harder" in whole and "solves fewer of the harder" not in table
    kept.rename(lost)


def test_a_folder_made_with_other_settings_is_refused_and_a_further_command_keeps_what_stands_there(
        smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"another .*recipe\.optim.*; give the same settings"):
        study.run(smoke, lambda text: None, only=("grpo",), smoke=True, overrides=(*QUICK, "optim.steps=3"))
    monkeypatch.setattr(study, "do", lambda job, console: None)
    study.run(smoke, lambda text: None, only=("grpo",), seeds=(0,), smoke=True, overrides=QUICK)
    assert [*json.loads((smoke / "measures.json").read_text())] == ["base", *ARMS]


def test_without_matplotlib_the_tables_are_written_and_say_so(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, tables = study.collect(smoke)
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert "selftaught[plots]" in page.write(smoke, found, tables, study.plan_of(True, QUICK))
    assert "<img" not in (smoke / "page.html").read_text()


def test_a_recipe_of_another_model_needs_no_base_stage(tmp_path: Path) -> None:
    plan = study.plan_of(False, ["recipe=graphs/qwen3-1.7b", "optim.steps=3"])
    assert (plan.recipe, plan.larger, plan.extra) == ("graphs/qwen3-1.7b", (15, 20), ("optim.steps=3",))
    assert study._model(plan, tmp_path, lambda text: None) == "Qwen/Qwen3-1.7B"
    assert not list(tmp_path.iterdir())


def test_the_pages_markdown_becomes_its_html() -> None:
    html = "".join(page._html("a < b\n\n### t\n\n| x | y\\|z |\n| --- | --- |\n| 1 | 2 |\n\n- item"))
    assert html == ("<p>a &lt; b</p><h2>t</h2><table><tr><td>x</td><td>y|z</td></tr><tr><td>1</td><td>2</td></tr>"
                    "</table><p>- item</p>")  # fmt: skip


def test_the_command_names_the_study_and_its_arms(tmp_path: Path) -> None:
    done = cli("study", "graph", "--out", str(tmp_path))
    assert done.code == 2 and "did you mean 'graphs'" in done.err
    done = cli("study", "graphs", "--out", str(tmp_path), "--only", "sdds")
    assert done.code == 2 and "did you mean 'sdsd'" in done.err
