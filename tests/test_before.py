"""`eval.before`: what another run measured before its training is taken over, and only where it is the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import selftaught
from own import cli, lines, make_home, recipe_of, write_recipe
from selftaught.rollout import TransformersEngine
from selftaught.train import Finished


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("before"))


@pytest.fixture(scope="module")
def first(home: Path) -> Finished:
    return trained(home, "first")


def trained(home: Path, name: str, **sections: Any) -> Finished:
    given = recipe_of(home, out=str(home / "runs" / name), **{"optim": {"steps": 1}, **sections})
    return selftaught.train(given, console=Console(quiet=True))


def rows(run: Finished, step: int = 0) -> list[dict[str, Any]]:
    return [row for row in lines(run.folder / "completions.jsonl") if row["step"] == step]


def taking_over(home: Path, first: Finished, name: str, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> tuple[
        Finished, list[int]]:
    """A run with `eval.before`, and how many problems its engine was asked at each call."""
    asked, submit = list[int](), TransformersEngine.submit

    def counted(self: TransformersEngine, requests: Any, n: int, sampling: Any) -> None:
        asked.append(len(requests))
        submit(self, requests, n, sampling)

    monkeypatch.setattr(TransformersEngine, "submit", counted)
    evaluation = {"before": str(first.folder), **sections.pop("eval", {})}
    return trained(home, name, eval=evaluation, **sections), asked


def test_the_same_start_is_measured_once(home: Path, first: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked_plain = taking_over(home, first, "plain", monkeypatch, eval={"before": None})
    monkeypatch.undo()
    run, asked = taking_over(home, first, "same", monkeypatch)
    assert rows(run) == rows(first) == rows(plain) and rows(run, 1) == rows(plain, 1)
    assert run.results["difference"] == plain.results["difference"]
    arms = {row["arm"] for row in rows(run)}
    assert len(asked_plain) - len(asked) == len(arms) >= 1


@pytest.mark.parametrize("changed", [
    {"seed": 5}, {"eval": {"samples": 3}}, {"eval": {"temperature": 0.5}},
    {"reward": [{"name": "exact", "weight": 0.5}, {"name": "length", "weight": 0.5, "buffer": 1}]},
    {"data": {"question": "Task: {question}\n"}}, {"optim": {"steps": 1, "dtype": "bfloat16"}},
], ids=["seed", "samples", "temperature", "reward", "prompt", "precision"])  # fmt: skip
def test_another_start_is_sampled_anew(home: Path, first: Finished, changed: dict[str, Any],
                                       monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    run, asked = taking_over(home, first, f"other-{name}", monkeypatch, **changed)
    monkeypatch.undo()
    plain = trained(home, f"alone-{name}", **changed)
    assert rows(run) == rows(plain)
    assert asked[0] == len({row["problem"] for row in rows(plain)})


def test_a_start_whose_recipe_samples_in_another_precision_is_sampled_anew(home: Path, first: Finished, tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(first.folder, tmp_path / "copy"))
    recipe = yaml.safe_load((copy / "run.yaml").read_text())
    recipe["rollout"]["vllm"] = {"dtype": "bfloat16"}
    (copy / "run.yaml").write_text(yaml.safe_dump(recipe))
    run, asked = taking_over(home, replace(first, folder=copy), "sampler", monkeypatch)
    assert asked[0] == len({row["problem"] for row in rows(run)})


def test_a_folder_that_holds_no_evaluation_is_refused_before_a_model_loads(home: Path, tmp_path: Path) -> None:
    path = write_recipe(home, "before.yaml", out=str(home / "runs" / "refused"))
    said = cli("train", path, f"eval.before={tmp_path}")
    assert said.code == 2 and "eval.before" in said.err and "run.yaml" in said.err and "Traceback" not in said.err


def test_other_answers_under_the_same_prompts_are_judged_anew(home: Path, first: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(first.folder, tmp_path / "copy")
    changed = [{**row, "reference": "another"} for row in lines(folder / "completions.jsonl")]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    run = trained(home, "answers", eval={"before": str(folder)})
    assert rows(run) == rows(first)


@pytest.mark.parametrize("name, text", [("run.yaml", ""), ("run.yaml", "{"), ("completions.jsonl", "{}\n")])
def test_a_damaged_folder_is_refused_before_a_model_loads(home: Path, first: Finished, tmp_path: Path, name: str,
                                                          text: str) -> None:
    folder = shutil.copytree(first.folder, tmp_path / "copy")
    (folder / name).write_text(text)
    said = cli("train", write_recipe(home, "damaged.yaml", out=str(home / "runs" / "damaged")), f"eval.before={folder}")
    assert said.code == 2 and name in said.err and "Traceback" not in said.err


def test_a_run_outlives_the_folder_that_it_took_from(home: Path, first: Finished, tmp_path: Path) -> None:
    """It can be evaluated, and resumed, when that is gone."""
    folder = shutil.copytree(first.folder, tmp_path / "gone")
    run = trained(home, "outlives", eval={"before": str(folder)}, optim={"steps": 2}, checkpoint={"every": 1})
    shutil.rmtree(folder)
    said = cli("eval", run.folder)
    assert said.code == 0, said.err
    shutil.rmtree(run.folder / "checkpoints" / "step-2")
    again = cli("train", run.folder / "run.yaml", "--resume")
    assert again.code == 0 and "resumed after step 1" in again.out, again.err
