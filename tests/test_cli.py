"""The command line, from a user's own files to a folder that anybody can load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import selftaught
from own import Said, cli, lines, make_home, recipe_of, write_recipe
from selftaught.data import DataConfig, load
from selftaught.reward import RewardConfig
from selftaught.run import load_run

SOURCES = Path(__file__).resolve().parent.parent / "src"
METHODS = ("grpo", "rlsd", "opsd")
STEPS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, tuple[Path, Said]]:
    """One run by each method; the first in a process of its own, with nothing of the tests' in it."""
    found = {}
    for method in METHODS:
        path = write_recipe(home, f"{method}.yaml", method={"name": method}, out=str(home / "runs" / method),
                            report={"html": True, "to": ["tensorboard"]},
                            eval={"every": 2, "samples": 4, "k": [1, 4]})  # fmt: skip
        if method == METHODS[0]:
            environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
            command = [sys.executable, "-m", "selftaught.cli", "train", str(path), f"optim.steps={STEPS}"]
            done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
            said = Said(done.returncode, done.stdout, done.stderr)
        else:
            said = cli("train", path, f"optim.steps={STEPS}")
        assert said.code == 0, said.out + said.err
        found[method] = home / "runs" / method, said
    return found


# A user's own run: their problems, their reward, their model.


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_every_file_of_its_folder(runs: dict[str, tuple[Path, Said]], method: str) -> None:
    folder, _ = runs[method]
    assert {path.name for path in folder.iterdir()} == {
        "run.yaml", "versions.json", "metrics.jsonl", "rollouts", "completions.jsonl", "checkpoints", "final",
        "results.json", "report.html", "curves.png", "tensorboard",
    }  # fmt: skip
    recipe = yaml.safe_load((folder / "run.yaml").read_text())
    assert recipe["method"]["name"] == method and recipe["optim"]["steps"] == STEPS
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [("eval/pass@1" in row, "loss" in row) for row in rows] == [
        (True, False), (False, True), (True, True), (True, True)]  # fmt: skip
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == [f"step-{n}.jsonl" for n in (1, 2, 3)]
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"step-2", "step-3"}
    parts = {path.stem for path in (folder / "checkpoints" / "step-3").glob("*.safetensors")}
    assert parts == {"model", "optimizer"} | ({"teachers"} if method != "grpo" else set())


@pytest.mark.parametrize("method", METHODS)
def test_every_completion_is_saved_and_results_follow_from_them(
    runs: dict[str, tuple[Path, Said]], method: str
) -> None:
    folder, _ = runs[method]
    rows = lines(folder / "completions.jsonl")
    student = [row for row in rows if row["arm"] == "student"]
    assert {row["step"] for row in student} == {0, 2, 3}
    assert all(sum(row["step"] == step for row in student) == 6 * 4 for step in (0, 2, 3))
    assert {row["arm"] for row in rows} == {
        "student", "other_prompt", "teacher/right", "teacher/wrong", "teacher/empty"}  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    for part, step in (("before", 0), ("after", 3)):
        mean = sum(row["score"] >= 1 for row in student if row["step"] == step) / 24
        assert results[part]["pass@1"]["value"] == pytest.approx(mean)
    assert set(results["controls"]) == {"other_prompt", "teacher/right", "teacher/wrong", "teacher/empty"}
    assert results["difference"]["pass@1"].keys() >= {"value", "low", "high", "p"}
    assert results["best_constant"]["answer"] in {row["reference"] for row in student}
    page = (folder / "report.html").read_text()
    assert "Held-out accuracy" in page and page.count("<svg") > 5
    assert "http" not in page.replace("http://www.w3.org", "")  # it needs no network


@pytest.mark.parametrize("method", METHODS)
def test_final_is_a_plain_folder_with_other_weights_and_a_card(
    home: Path, runs: dict[str, tuple[Path, Said]], method: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = runs[method]
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    start = AutoModelForCausalLM.from_pretrained(home / "model")
    assert model.config.architectures == ["LlamaForCausalLM"] and tokenizer.chat_template == (
        AutoTokenizer.from_pretrained(home / "model").chat_template)  # fmt: skip
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(start.state_dict()[name])}
    assert moved == set(start.state_dict())
    saved = load_file(folder / "checkpoints" / "step-3" / "model.safetensors")
    assert all(tensor.equal(saved[name]) for name, tensor in model.state_dict().items())
    ids = tokenizer("Question: 3 + 8\nAnswer:", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    card = (folder / "final" / "README.md").read_text()
    assert method in yaml.safe_load(card.split("---\n")[1])["tags"] and "from_pretrained" in card


def test_a_run_says_what_it_does_in_plain_lines(runs: dict[str, tuple[Path, Said]]) -> None:
    folder, said = runs["grpo"]
    out = said.out.splitlines()
    assert "data: " in out[0] and "prompt <- question, answer <- gold" in out[0]
    assert "evaluating before training: 6 held-out problems, 4 samples each" in out
    assert [line.split("  ")[0] for line in out if line.startswith("step ")] == [f"step {n}/3" for n in range(4)]
    assert any(line.startswith("pass@4 ") for line in out)
    assert any(line.startswith("Held-out pass@1 ") and "paired difference" in line for line in out)
    assert f"report: {folder / 'report.html'}" in out and f"model:  {folder / 'final'}" in out
    assert said.err == ""  # no progress bars or warnings of the libraries below


# eval, report, methods.


def responses(path: Path, step: int = 0) -> list[str]:
    return [row["response"] for row in lines(path) if row["step"] == step and row["arm"] == "student"]


def test_eval_measures_a_finished_run_by_its_own_recipe(home: Path, runs: dict[str, tuple[Path, Said]]) -> None:
    folder, _ = runs["grpo"]
    said = cli("eval", folder)
    assert said.code == 0, said.err
    # The same weights, problems and randomness as the run's own last evaluation give the same responses.
    assert responses(folder / "evals" / "run" / "completions.jsonl") == responses(folder / "completions.jsonl", 3)
    said = cli("eval", folder, home / "grpo.yaml", "seed=5", "--k", "2", "--json", home / "two.json")
    assert said.code == 0 and str(folder / "evals" / "grpo" / "completions.jsonl") in said.out
    assert "pass@2" in json.loads((home / "two.json").read_text())
    assert cli("eval", folder).code == 0 and (folder / "evals" / "run-2").is_dir()
    assert cli("train", home / "grpo.yaml", f"optim.steps={STEPS}", "--resume").code == 0  # still a run's folder


def test_eval_leaves_out_what_the_run_has_trained_on(home: Path, runs: dict[str, tuple[Path, Said]]) -> None:
    folder, _ = runs["grpo"]
    taught = {row["problem"] for path in (folder / "rollouts").iterdir() for row in lines(path)}
    out = home / "wider"
    said = cli("eval", folder, "data.heldout=14", "data.train=8", f"out={out}")  # the same order: 8 of the run's 16
    assert said.code == 0, said.err
    assert "8 of 14 held-out problems left out" in said.out
    asked = {row["problem"] for row in lines(out / "completions.jsonl")}
    assert asked == {row["problem"] for row in lines(folder / "completions.jsonl") if row["arm"] == "student"}
    said = cli("eval", folder, "seed=3", f"out={home / 'reseeded'}")
    assert said.code == 0 and "left out" in said.out
    assert not taught & {row["problem"] for row in lines(home / "reseeded" / "completions.jsonl")}
    recipe = yaml.safe_load((folder / "run.yaml").read_text())
    train = load(DataConfig.model_validate(recipe["data"]), seed=recipe["seed"], say=lambda line: None).train
    (home / "seen.jsonl").write_text("".join(json.dumps(dict(problem.columns)) + "\n" for problem in train))
    said = cli("eval", folder, f"data.source={home / 'seen.jsonl'}", "data.train=8")
    assert said.code == 2 and "trained on every one of the 6 held-out problems" in said.err
    assert "left out" not in cli("eval", home / "model", home / "grpo.yaml", "seed=3", f"out={home / 'none'}").out


def test_eval_measures_a_model_on_a_recipe(home: Path, runs: dict[str, tuple[Path, Said]]) -> None:
    folder, _ = runs["grpo"]
    said = cli("eval", home / "model", home / "grpo.yaml")
    assert said.code == 0, said.err
    saved = home / "runs" / "evals" / "model-grpo" / "completions.jsonl"
    assert responses(saved) == responses(folder / "completions.jsonl")


def test_eval_of_a_file_alone_gives_each_measure_with_its_interval(
    home: Path, runs: dict[str, tuple[Path, Said]]
) -> None:
    folder, _ = runs["rlsd"]
    out = home / "measures.json"
    said = cli("eval", "--completions", folder / "completions.jsonl", "--k", "1,4", "--json", out)
    assert said.code == 0 and said.err == ""
    found = json.loads(out.read_text())
    assert found["pass@1"].keys() == found["pass@4"].keys() == {"value", "low", "high"}
    results = json.loads((folder / "results.json").read_text())
    assert found["pass@4"] == results["after"]["pass@4"]
    assert "pass@1" in said.out and "best_constant" in said.out
    assert cli("eval", "--completions", folder / "rollouts" / "step-1.jsonl").code == 0  # training rollouts too


def test_report_overlays_runs(home: Path, runs: dict[str, tuple[Path, Said]]) -> None:
    said = cli("report", runs["grpo"][0], runs["rlsd"][0], "--out", home / "both.html")
    assert said.code == 0 and said.out == f"report: {home / 'both.html'}\n"
    page = (home / "both.html").read_text()
    assert "2 runs" in page and "grpo" in page and "rlsd" in page


def test_methods_lists_them_and_shows_the_equations_of_one() -> None:
    said = cli("methods")
    assert said.code == 0
    assert all(f"\n{name} " in said.out for name in METHODS) and "2604.03128" in said.out and "…" not in said.out
    said = cli("methods", "rlsd")
    assert said.code == 0
    for part in ("arXiv 2604.03128", "clip(exp(sign(A) d)", "eps_w = 0.2", "view teacher: snapshot weights"):
        assert part in said.out


@pytest.mark.parametrize("width", [80, 130])
def test_methods_shows_every_column_in_a_terminal_of_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = cli("methods").out
    table, _, last = said.rpartition("\n\n")
    assert max(map(len, said.splitlines())) <= width and "…" not in said and "selftaught methods NAME" in last
    words = " ".join(table.split())
    assert all(word in words for word in ("teaches", "sees", "divergence", "exist", "arXiv", "reward,", "2606.30626"))


def test_help_is_one_screen_and_names_the_commands() -> None:
    said = cli("--help")
    assert said.code == 0 and said.out.startswith("Usage: selftaught ")
    assert all(command in said.out for command in ("train", "eval", "doctor", "methods", "report"))


# Before a run.


def test_a_dry_run_is_a_recipe_again_and_writes_nothing(home: Path) -> None:
    path = write_recipe(home, "dry.yaml", out=str(home / "runs" / "dry"))
    before = sorted(home.rglob("*"))
    said = cli("train", path, "--dry-run", "optim.steps=7")
    assert said.code == 0 and said.err == ""
    assert sorted(home.rglob("*")) == before
    assert "# tokens    prompts up to" in said.out and "560 in the run" in said.out  # 2 x 4 x 10 x 7
    assert "# memory    about" in said.out
    again = home / "dry-again.yaml"
    again.write_text(said.out)
    assert yaml.safe_load(said.out)["optim"]["steps"] == 7
    assert cli("train", again, "--dry-run").out == said.out


def test_a_dry_run_and_the_doctor_say_that_a_folder_is_taken(home: Path, runs: dict[str, tuple[Path, Said]]) -> None:
    folder, _ = runs["grpo"]
    told = f"out: {folder} already holds a run; add --resume"
    assert f"# {told}" in (said := cli("train", folder, "--dry-run")).out and said.code == 0
    assert told not in cli("train", folder, "--dry-run", "--resume").out
    assert f"CHANGE  {told}" in (said := cli("doctor", folder)).out and said.code == 1
    assert "CHANGE" not in (said := cli("doctor", folder, "--resume")).out and said.code == 0, said.out
    moved = Path(shutil.copytree(folder, home / "runs" / "moved"))
    assert yaml.safe_load(cli("train", moved, "--dry-run").out)["out"] == str(moved)


@pytest.mark.parametrize("reward", ["numeric", {"name": "numeric"}, ["numeric"], [{"name": "numeric"}]], ids=repr)
def test_the_rewards_own_settings_are_overridden_in_each_of_its_forms(home: Path, reward: object) -> None:
    recipe = load_run({**recipe_of(home), "reward": reward}, ["reward.shuffle=true", "reward.timeout=3"])
    assert recipe.reward == RewardConfig.parse({"parts": [{"name": "numeric"}], "shuffle": True, "timeout": 3})


def doctored(home: Path, name: str, **sections: object) -> Said:
    path = write_recipe(home, f"doctor-{name}.yaml", out=str(home / "runs" / f"doctor-{name}"), **sections)
    before = sorted(home.rglob("*"))
    said = cli("doctor", path)
    assert sorted(home.rglob("*")) == before  # it looks and leaves nothing behind
    assert "Traceback" not in said.err
    return said


def test_doctor_finds_a_sane_recipe_sane_and_shows_the_seam(home: Path) -> None:
    said = doctored(home, "sane", method={"name": "rlsd"})
    found = [line for line in said.out.splitlines() if line.startswith(("ok ", "CHANGE "))]
    assert said.code == 0 and len(found) >= 9 and all(line.startswith("ok ") for line in found), said.out
    for part in ("torch", "device cpu", "memory", "prompts: ", "reward of a right answer", "of a wrong answer",
                 "of an empty answer", "time: a step about", "sampler against scorer", "null teacher"):  # fmt: skip
        assert any(part in line for line in found), part
    assert "[[+ Hint: the answer is" in said.out and " +]]" in said.out


@pytest.mark.parametrize(
    ("name", "body", "code", "part"),
    [
        ("silent", "[None] * len(completions)", 1, "the reward has no opinion (None) of it"),
        ("constant", "[1.0] * len(completions)", 1, "no less than a right one: look at `reward`"),
        ("fragile", "[float(text) for text in completions]", 1, "the reward fails on it (ValueError"),
        ("broken", "[1 / 0]", 2, "fails on a trial completion: ZeroDivisionError"),
    ],
)
def test_doctor_names_what_is_wrong_with_a_reward(home: Path, name: str, body: str, code: int, part: str) -> None:
    file = home / f"{name}.py"
    file.write_text(f"def score(completions, **columns):\n    return {body}\n")
    said = doctored(home, name, reward=f"{file}:score")
    assert said.code == code
    found = said.err if code == 2 else "".join(line for line in said.out.splitlines() if line.startswith("CHANGE "))
    assert part in found, said.out + said.err


def test_doctor_names_responses_that_are_cut_off(home: Path) -> None:
    said = doctored(home, "cut", rollout={"stop": [], "max_completion_length": 3})
    assert said.code == 1
    change = [line for line in said.out.splitlines() if line.startswith("CHANGE ")]
    assert len(change) == 1 and "reached the limit of 3 tokens: raise rollout.max_completion_length" in change[0]


def test_the_version_is_that_of_the_package() -> None:
    said = cli("--version")
    assert (said.code, said.out) == (0, f"selftaught {selftaught.__version__}\n")
