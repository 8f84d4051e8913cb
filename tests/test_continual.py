"""Continual learning: the measures against their definitions, the intervals, and cells that are evaluated once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from own import cli, make_home, recipe_of
from selftaught.errors import UserError
from selftaught.eval import append_rows
from selftaught.eval.continual import column, sequence_lines, summarise_sequence, transfer
from selftaught.studies import continual as study


def by_definition(R: list[list[float]], b: list[float]) -> dict[str, float]:
    """Lopez-Paz & Ranzato 2017, section 2, and Chaudhry et al. 2018, with indices from 1 as they are printed."""
    T = len(R)
    a = {(i, j): R[i - 1][j - 1] for i in range(1, T + 1) for j in range(1, T + 1)}
    return {
        "average_accuracy": sum(a[T, i] for i in range(1, T + 1)) / T,
        "backward_transfer": sum(a[T, i] - a[i, i] for i in range(1, T)) / (T - 1),
        "forward_transfer": sum(a[i - 1, i] - b[i - 1] for i in range(2, T + 1)) / (T - 1),
        "forgetting": sum(max(a[m, j] for m in range(1, T)) - a[T, j] for j in range(1, T)) / (T - 1),
    }


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_measures_are_their_definitions_on_random_matrices_and_batches_of_them(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    many, base = rng.random((7, tasks, tasks)), rng.random((7, tasks))
    together = transfer(many, base)
    for n in range(7):
        expected = by_definition(many[n].tolist(), base[n].tolist())
        assert transfer(many[n], base[n]) == pytest.approx(expected, abs=1e-12)
        assert {name: value[n] for name, value in together.items()} == pytest.approx(expected, abs=1e-12)
        assert together["forgetting"][n] >= -together["backward_transfer"][n] - 1e-12


def test_known_matrices() -> None:
    learns = np.array([[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.4, 0.6, 0.7]])
    found = transfer(learns, np.array([0.1, 0.1, 0.1]))
    assert found == pytest.approx({"average_accuracy": 1.7 / 3, "backward_transfer": (-0.5 - 0.2) / 2,
                                   "forward_transfer": (0.1 + 0.2) / 2, "forgetting": (0.5 + 0.2) / 2})  # fmt: skip
    later = np.array([[0.3, 0.2], [0.5, 0.6]])  # the second task taught the first
    assert transfer(later)["backward_transfer"] == pytest.approx(0.2)
    assert transfer(later)["forgetting"] == pytest.approx(-0.2) and "forward_transfer" not in transfer(later)
    assert transfer(np.array([[0.5]]), np.array([0.1])) == {"average_accuracy": 0.5}


def rows(right: dict[str, list[int]]) -> list[dict[str, Any]]:
    return [{"problem": problem, "sample": n, "score": float(r), "status": "right" if r else "wrong", "answer": str(r)}
            for problem, each in right.items() for n, r in enumerate(each)]  # fmt: skip


def test_a_column_is_of_the_problems_that_every_checkpoint_answered_often_enough() -> None:
    first = rows({"a": [1, 0], "b": [0, 0], "c": [1, 1], "only": [1, 1]})
    second = rows({"c": [0, 1], "b": [1, 1], "a": [1]})
    values_PC, left_out = column([first, second], 1)
    assert values_PC.tolist() == [[0.5, 1.0], [0.0, 1.0], [1.0, 0.5]] and left_out == 1
    values_PC, left_out = column([first, second], 2)  # the second has one sample of a
    assert values_PC.tolist() == [[0.0, 1.0], [1.0, 1.0]] and left_out == 2
    values_PC, left_out = column([first, rows({"z": [1]})], 1)
    assert values_PC.shape == (0, 2) and left_out == 5


def test_intervals_are_those_of_all_resamples_of_paired_problems() -> None:
    """Three problems a task: all 27 x 27 resamples are enumerated; checkpoints share the resample, tasks do not."""
    first_PC = np.array([[0.0, 1.0, 0.2], [0.3, 0.9, 0.9], [0.1, 0.5, 0.8]])
    second_PC = np.array([[0.2, 0.1, 1.0], [0.0, 0.7, 0.6], [0.4, 0.4, 0.9]])
    found = summarise_sequence({"one": first_PC, "two": second_PC}, 2, ["before", "one", "two"], draws=40_000)
    draws = list(itertools.product(range(3), repeat=3))
    exact: dict[str, list[float]] = {}
    for one, two in itertools.product(draws, draws):
        means = np.stack([first_PC[list(one)].mean(0), second_PC[list(two)].mean(0)], -1)
        for name, value in by_definition(means[1:].tolist(), means[0].tolist()).items():
            exact.setdefault(name, []).append(value)
    for name, values in exact.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert found[name]["low"] == pytest.approx(low, abs=0.02)
        assert found[name]["high"] == pytest.approx(high, abs=0.02)
    change = [first_PC[list(draw)].mean(0) for draw in draws] * 100  # so that its ends are outcomes, not between two
    low, high = np.quantile([c[2] - c[0] for c in change], [0.025, 0.975])
    assert found["change"]["one"]["value"] == pytest.approx(float((first_PC[:, 2] - first_PC[:, 0]).mean()))
    assert (found["change"]["one"]["low"], found["change"]["one"]["high"]) == pytest.approx((low, high), abs=0.02)
    assert found["matrix"][2][0]["value"] == pytest.approx(first_PC[:, 2].mean())


def test_what_does_not_fit_is_refused_and_a_task_without_shared_problems_is_named() -> None:
    some = np.zeros((3, 2))
    with pytest.raises(UserError, match="2 checkpoints for 3 tasks learned"):
        summarise_sequence({"a": some, "b": some, "c": some}, 3, ["x", "y"])
    with pytest.raises(UserError, match="task 'b': there is no problem"):
        summarise_sequence({"a": some, "b": np.zeros((0, 2))}, 1, ["x", "y"])
    found = summarise_sequence({"a": some, "other": some + 0.5}, 1, ["before", "a"])
    text = "\n".join(sequence_lines(found))
    assert "| other (3), never trained on |" in text
    assert "| before | 0.000 [0.000, 0.000] | 0.500 [0.500, 0.500] |" in text
    assert "forgetting" not in text and "- average accuracy: 0.000 [0.000, 0.000]" in text


# The command.


class Evaluator:
    """Stands for the sampling: writes rows of which as many are right as the model's name says, and notes its calls."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fail_at = fail_at

    def __call__(self, model: str, recipe: str, overrides: Any, say: Any, *, resume: bool) -> None:
        out = Path(next(o for o in overrides if o.startswith("out="))[4:])
        assert resume == out.exists()  # one that was stopped goes on
        out.mkdir(parents=True, exist_ok=True)
        (out / "completions.jsonl").unlink(missing_ok=True)
        if len(self.calls) == self.fail_at:
            (out / "completions.jsonl").write_text('{"problem": "half')
            raise KeyboardInterrupt
        self.calls.append((Path(model).name, Path(recipe).stem))
        share = {"base": 1, "one": 3, "two": 2}[Path(model).name] + (Path(recipe).stem == "far")
        append_rows(out / "completions.jsonl", rows({str(p): [p % 4 < share, p % 4 < share] for p in range(8)}))


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    home = make_home(tmp_path / "home")
    for name in ("near", "far"):
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe_of(home)))
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    found = {name: str(tmp_path / name) for name in ("base", "one", "two")}
    return found | {name: str(home / name) for name in ("near.yaml", "far.yaml")}


def test_a_stopped_evaluation_goes_on_at_the_missing_cell_and_never_does_one_twice(
    places: dict[str, str], tmp_path: Path
) -> None:
    models, tasks = [places["base"], places["one"], places["two"]], [places["near.yaml"], places["far.yaml"]]
    stopped, said = Evaluator(fail_at=3), list[str]()
    with pytest.raises(KeyboardInterrupt):
        study.run(models, tasks, tmp_path / "out", said.append, evaluate=stopped)
    assert stopped.calls == [("base", "near"), ("base", "far"), ("one", "near")]
    again = Evaluator()
    text = study.run(models, tasks, tmp_path / "out", said.append, evaluate=again)
    assert again.calls == [("one", "far"), ("two", "near"), ("two", "far")]
    found = json.loads((tmp_path / "out" / "matrix.json").read_text())
    values = [[cell["value"] for cell in row] for row in found["matrix"]]
    assert values == [[0.25, 0.5], [0.75, 1.0], [0.5, 0.75]]
    expected = by_definition([[0.75, 1.0], [0.5, 0.75]], [0.25, 0.5])
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected)
    assert "| far: two | 0.500 [" in text and (tmp_path / "out" / "matrix.md").read_text() == text + "\n"
    assert (tmp_path / "out" / "task-sequence.png").read_bytes().startswith(b"\x89PNG")
    third = Evaluator()
    assert study.run(models, tasks, tmp_path / "out", said.append, evaluate=third, k=2) and third.calls == []
    study.run(models[:2], tasks[:1], tmp_path / "out", said.append, untrained=tasks[1:], evaluate=third)
    assert third.calls == []  # a shorter sequence stands on the same cells


def test_a_cell_of_another_recipe_or_of_other_weights_is_refused_by_what_differs(
    places: dict[str, str], tmp_path: Path
) -> None:
    def run(*overrides: str) -> None:
        study.run([places["one"]], [places["near.yaml"]], tmp_path / "out", lambda line: None, overrides=overrides,
                  evaluate=Evaluator())  # fmt: skip

    run()
    run()
    with pytest.raises(UserError, match=r"made with recipe\.eval\.temperature = 1\.0, and now it is 0\.5; delete"):
        run("eval.temperature=0.5")
    (Path(places["one"]) / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match=r"made with weights\.model\.safetensors"):
        run()


def test_mistakes_are_refused_before_anything_is_evaluated(places: dict[str, str], tmp_path: Path) -> None:
    def run(models: list[str], tasks: list[str]) -> None:
        study.run(models, tasks, tmp_path / "out", lambda line: None, evaluate=Evaluator())

    with pytest.raises(UserError, match="3 models for 1 tasks"):
        run([places["base"], places["one"], places["two"]], [places["near.yaml"]])
    with pytest.raises(UserError, match="have one name"):
        run([places["base"], places["one"]], [places["near.yaml"], str(tmp_path / "near.yaml")])
    with pytest.raises(UserError, match="no task is given"):
        run([places["base"]], [])
    assert not (tmp_path / "out").exists()


def test_the_command_samples_verifies_and_prints_the_matrix(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    trained = make_home(tmp_path / "trained", seed=1)
    for name, section in (("low", {"heldout": 4}), ("high", {"heldout": 3, "train": 10})):
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe_of(home, data=section)))
    asked = ("continual", home / "model", trained / "model", "eval.samples=2", "eval.k=[1,2]", "--task",
             home / "low.yaml", "--untrained", home / "high.yaml", "--out", tmp_path / "out")  # fmt: skip
    said = cli(*asked)
    assert said.code == 0, said.err
    assert "cell 4 of 4 missing" in said.out and "| before: model |" in said.out and "| low: model |" in said.out
    found = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert found["problems"] == {"low": 4, "high": 3}
    saved = (tmp_path / "out").rglob("completions.jsonl")
    cells = sorted(path.relative_to(tmp_path / "out").as_posix() for path in saved)
    assert cells == [f"cells/{n}-model/{task}/completions.jsonl" for n in (0, 1) for task in ("high", "low")]
    again = cli(*asked)
    assert again.code == 0 and "missing" not in again.out
    assert again.out.strip() == said.out[said.out.index("| after"):].strip()
