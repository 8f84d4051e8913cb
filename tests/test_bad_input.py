"""A user's mistake costs one clear message with the remedy, exit code 2, and nothing that was computed before."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from own import METHOD, cli, command, forked, lines, make_home, recipe_of, write_recipe
from selftaught import assemble
from selftaught import cli as cli_module
from selftaught.errors import UserError
from selftaught.optim import checkpoints
from selftaught.report import trackers
from selftaught.run import load_run

SOURCES = Path(__file__).resolve().parent.parent / "src"
Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, loading a model is a failure of the test."""

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(assemble, "load_model", load)


def refused(*args: str | Path) -> str:
    """What the command said, which must be one message and exit code 2."""
    said = cli(*args)
    assert said.code == 2 and "Traceback" not in said.err, said.out + said.err
    assert said.err.startswith("error: ") and said.err.count("error: ") == 1
    return said.err


# Recipes.

RECIPES = {
    "misspelt key": ("optim.stepz=3", "unknown key 'optim.stepz'; did you mean 'steps'?"),
    "key of another section": ("steps=3", "unknown key 'steps'; did you mean 'optim.steps'?"),
    "misspelt key of another section": ("checkpoint.heldoutt=3", "'checkpoint.heldoutt'; did you mean 'data.heldout'?"),
    "misspelt section": ("modle=x", "unknown key 'modle'; did you mean 'model'?"),
    "misspelt key in a list": ("reward=[{name: exact, wieght: 2}]", "unknown key 'reward.parts.0.wieght'; did you"),
    "wrong type": ("optim.steps=many", "optim.steps = 'many': it should be a valid integer"),
    "switch for a number": ("optim.steps=true", "optim.steps: true is not a number"),
    "half a list": ("optim.betas=[0.9]", "optim.betas: has too few entries"),
    "reward without parts": ("reward=[]", "it should have at least 1 item"),
    "stop at nothing": ("rollout.stop=['']", "rollout.stop: an empty text stands at the beginning of every response"),
    "folder of nobody": ("out=~nobody-is-called-so/x", "out = '~nobody-is-called-so/x': "),
    "data that no disk can have": (f"data.source={'x' * 300}.jsonl", "cannot be looked at"),
    "wrong type of a section": ("rollout=3", "rollout = 3: it should be a mapping"),
    "out of range": ("optim.learning_rate=-1", "optim.learning_rate = -1: it should be greater than 0"),
    "nothing to round": ("optim.master=stochastic", "optim.master = stochastic: the weights are trained in float32"),
    "unknown choice": ("optim.schedule=cosin", "it should be 'constant', 'cosine' or 'linear'"),
    "unknown method": ("method=grpoo", "unknown method 'grpoo'; did you mean 'grpo'?"),
    "unknown field of a method": ("method={name: rlsd, epsw: 1}", "no field 'epsw'; did you mean 'eps_w'?"),
    "value that a method refuses": ("method={name: rlsd, lam: 2}", "lam = 2: must be in [0, 1]"),
    "text for a number": ("method={name: sdpg, alpha: 1e-3}", "alpha = '1e-3': must be a number (in YAML"),
    "clip of everything": ("method={name: grpo, eps_low: 1.0}", "1.0: must be in [0, 1), or None (null in YAML) for"),
    "negative cap": ("method={name: cispo, cap: -1}", "cap = -1: must be in (0, inf]"),
    "weight at its end": ("method={name: gkd, weight: 1}", "weight = 1: must be in (0, 1); at the ends choose"),
    "blend above 1": ("method={name: demopsd, alpha_max: 1.5}", "alpha_max = 1.5: must be in [0, 1]"),
    "trim of everything": ("method={name: dopd, trim: 1}", "trim = 1: must be in [0, 1)"),
    "decay before the beginning": ("method={name: rlsd, lam_decay: -5}", "lam_decay = -5: must be a whole number in "),
    "infinite temperature": ("method={name: opsd, temperature: .inf}", "temperature = inf: must be in (0, inf)"),
    "half a top_k": ("method={name: sdpo, top_k: 1.5}", "top_k = 1.5: must be a whole number in [1, inf), or"),
    "unknown divergence": ("method={name: sdpo, divergence: kl}", "divergence = 'kl': must be one of js, kl_student"),
    "top_k above the vocabulary": ("method={name: sdpo, top_k: 9999}", "method.top_k = 9999: the model's vocabulary"),
    "live teacher on the plain prompt": ("method={name: opsd, teacher: {weights: live, context: plain}}",
                                         "its teacher is the live model on the plain prompt, which is the student"),
    "unknown teacher": ("method={name: opsd, teacher: {weights: emma}}", "weights = 'emma'; did you mean 'ema'?"),
    "teacher without its rate": ("method={name: opsd, teacher: {weights: ema}}", "the rate of an ema teacher must"),
    "unknown privilege": ("privilege=answr", "or 'empty'; did you mean 'answer'?"),
    "skip of every token": ("method={name: sdft, skip: 16}", "method.skip = 16: no token of a response is left"),
    "two teachers that are one": ("method={name: dopd, teacher: {weights: live}}",
                                  "teacher and privileged_student are the same live model that sees the same"),
    "unknown verifier": ("reward=numerc", "'numerc' is neither a verifier (did you mean 'numeric'?)"),
    "override without a value": ("optim.steps", "'optim.steps': write it as key=value"),
    "override with a key twice": ("optim={steps: 3, steps: 4}", "not valid YAML: the key 'steps' stands twice"),
    "override of no YAML": ("optim.steps=[", "'optim.steps=[': the value is not valid YAML"),
    "override below a number": ("seed.x=3", "seed is 0, which has no fields"),
    "k above samples": ("eval.k=[1,9]", "asks for pass@9, but eval.samples = 2: raise eval.samples to 9"),
    "best that is not measured": ("eval.best=pass@3", "eval.best = 'pass@3' is not measured; choose one of pass@1"),
    "one rollout in a group": ("rollout.num_generations=1", "rollout.num_generations = 1: method 'grpo' compares"),
    "truncated sampling": ("rollout.top_k=5", "set rollout.allow_truncated_support=true"),
    "budget below a response": ("optim.token_budget=10", "optim.token_budget = 10: too small for one response"),
    "warm-up over the run": ("optim.warmup_steps=9", "warmup_steps is 9, more than the run's 3 steps"),
    "no such device": ("device=cuda:77", "device = 'cuda:77': this machine or this build of torch has no such device"),
    "no such recipe file": (None, "neither a file nor a shipped recipe; known: "),
}  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be_is_refused(home: Path, case: str) -> None:
    override, message = RECIPES[case]
    path = write_recipe(home, "recipe.yaml", seed=0, out=str(home / "runs" / "never"))
    for verb in ("train", "doctor"):
        said = refused(verb, path, override) if override else refused(verb, home / "none.yaml")
        assert message in said
        assert len(said.splitlines()) <= (6 if "YAML" in message else 1), said
    assert not (home / "runs" / "never" / "run.yaml").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("method", ["sdpg", {"name": "opsd", "teacher": {"weights": "live"}}], ids=str)
def test_a_live_teacher_that_is_shown_nothing_is_refused(home: Path, method: Any) -> None:
    path = write_recipe(home, "null.yaml", method=method, privilege={"kind": "empty"})
    said = refused("train", path)
    assert "its teacher is the live model without a privilege (privilege.kind = 'empty'), which is the student" in said
    assert "privilege.kind=answer, or set method.teacher.weights to initial, ema or snapshot" in said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("method", ["opsd", "sdpo", "rlsd", "sdpg", "sdft", "demopsd"])
@pytest.mark.parametrize("kind", ["answer", "empty"])
def test_a_privilege_that_no_view_is_shown_is_refused(home: Path, method: str, kind: str) -> None:
    blind = {"name": method, "teacher": {"weights": "initial", "context": "plain"}}
    said = refused("train", write_recipe(home, "blind.yaml", method=blind, privilege={"kind": kind}))
    assert f"method {method!r} learns from a privilege, but none of its views is shown one" in said
    assert "set method.teacher.context=privileged" in said


@pytest.mark.parametrize("own", [None, False, True])
def test_a_live_teacher_that_only_thinks_is_not_the_student_unless_the_student_does(home: Path, own: Any) -> None:
    recipe = recipe_of(home, method={"name": "opsd", "teacher": {"weights": "live"}}, data={"thinking": own},
                       privilege={"kind": "empty", "thinking": True})
    if own:
        with pytest.raises(UserError, match="the live model without a privilege"):
            load_run(recipe)
    else:
        load_run(recipe)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("needs", "privilege", "message"),
    [
        ("privilege", None, "method 'mine' needs a privilege, but the recipe has none; add for example"),
        ("solution", None, "needs a privilege, but the recipe has none; add for example `privilege: {kind: solution}`"),
        ("solution", {"kind": "answer"}, "privilege.kind = 'answer': method 'mine' needs solution; set"),
        ("feedback", {"kind": "hint"}, "method 'mine' needs feedback; set privilege.kind=feedback"),
        ("solution", {"kind": "solution"}, "'solution', but no problem has one; name its column"),
    ],
)  # fmt: skip
def test_a_method_says_which_privilege_it_cannot_do_without(home: Path, needs: str, privilege: Any,
                                                            message: str) -> None:
    seen = 'View("initial", "privileged")' if privilege else 'View("initial")'
    plain = METHOD.replace('"privilege"', f'"{needs}"', 1).replace('View("live", "privileged")', seen)
    (home / "needs.py").write_text(plain)
    path = write_recipe(home, "needs.yaml", method={"name": f"{home / 'needs.py'}:Mine"}, privilege=privilege)
    assert message in refused("train", path)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "not valid YAML"),
        ("", "must be a mapping of keys"),
        ("- a\n- b\n", "must be a mapping of keys"),
        ("model: quickstart\n", "data: missing; every recipe needs it\nmethod: missing"),
        ("model: m\ndata: d.jsonl\nmethod: opsd\n", "sees a privilege, but the recipe has none; add for example"),
        ("model: m\ndata: d.jsonl\nmethod: grpo\n", "needs a reward, but the recipe has none; add `reward: NAME"),
        ("model: m\ndata: d.jsonl\nmethod: opsd\nprivilege: answer\n", "add `reward: NAME` or set data.heldout=0"),
        (b"\xff\xfe\x00", "not valid YAML"),
        ("model: m\noptim:\n  steps: 3\nmethod: grpo\noptim:\n  minibatches: 2\n",
         "the key 'optim' stands twice, first in line 2, and only the last would count; join them, or remove one"),
        ("model: &m [*m]\n", "not valid YAML: this holds itself"),
        ("seed: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("model: m\noptim: {steps: 3, seed: 1, steps: 4}\n", "the key 'steps' stands twice, first in line 2"),
    ],
)  # fmt: skip
def test_a_broken_recipe_file_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused("train", path)
    assert message in said


# Data.

DATA = {
    "missing column": ("columns: {answer: golden}", None, "data.columns.answer", "'golden'; did you mean 'gold'?"),
    "no prompt column": ("columns: {}", '{"quest": "1 + 1", "gold": "2"}\n', "no prompt column", "{prompt: NAME}"),
    "empty file": ("columns: {}", "", "has no rows", "at least one problem"),
    "broken line": ("columns: {}", '{"question": "a", "gold": "b"}\n{"question": "c", "gold\n', "line 2", "mend it"),
    "a line that is no object": ("columns: {}", '{"question": "a", "gold": "b"}\n[1]\n', "line 2", "an object such as"),
    "an empty prompt": ("columns: {}", '{"question": "a"}\n{"question": " "}\n', "line 2", "fill it or delete the row"),
    "too few rows": ("columns: {}", '{"question": "a", "gold": "b"}\n', "has 1 distinct problems", "lower data.train"),
}  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_read_is_refused(home: Path, tmp_path: Path, case: str) -> None:
    columns, text, *messages = DATA[case]
    source = home / "mine.jsonl"
    if text is not None:
        source = tmp_path / "bad.jsonl"
        source.write_text(text)
    path = write_recipe(home, "data.yaml", out=str(tmp_path / "out"))
    said = refused("train", path, f"data.source={source}", f"data.{columns.replace(': ', '=', 1)}")
    assert all(message in said for message in messages) and str(source) in said


@pytest.mark.parametrize(("source", "message"), [
    ("/nowhere/mine.jsonl", "no file '/nowhere/mine.jsonl'"),
    ("gpqa:mine.jsonl", "no file 'mine.jsonl'"),
    ("gpqa:?domain=Physics", "says what the rows look like, but not where they are"),
    ("gym:chain_summ", "reasoning-gym has no task 'chain_summ'"),
    ("gym:chain_sum?max_term=3", "task 'chain_sum' has no parameter 'max_term'"),
    ("graphs:trian", "did you mean 'train'?"),
    ("graphs:train?sector=3", "did you mean 'sectors'?"),
])
def test_a_source_that_cannot_be_is_refused_before_a_model_is_converted(
    home: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    def look(name: str) -> None:
        raise AssertionError("the model was looked at")

    monkeypatch.setattr(assemble, "check_model", look)
    path = write_recipe(home, "data.yaml", model="quickstart", out=str(home / "runs" / "nosource"))
    assert message in refused("train", path, f"data.source={source}")
    assert not (home / "runs" / "nosource").exists()
    mixture = f"[{{source: '{home / 'mine.jsonl'}'}}, {{source: '{source}'}}]"
    assert message in refused("train", path, f"data.source={mixture}")


@pytest.mark.usefixtures("no_model")
def test_a_data_file_that_is_not_there_is_refused(home: Path) -> None:
    path = write_recipe(home, "data.yaml", out=str(home / "runs" / "nodata"))
    assert "no file '/nowhere/mine.jsonl'" in refused("train", path, "data.source=/nowhere/mine.jsonl")
    said = refused("train", path, "rollout.prompts_per_step=17")
    assert "rollout.prompts_per_step = 17, but there are only 16 training problems" in said
    assert "no problem has one" in refused("train", path, "privilege.kind=solution", "method=opsd")


# Models.

def each(paths: Iterable[Path], act: Callable[[Path], object]) -> None:
    for path in list(paths):
        act(path)


MODELS: dict[str, tuple[Break, str]] = {
    "no tokenizer": (lambda m: each(m.glob("tokenizer*"), Path.unlink), "has no tokenizer"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no weights (model.safetensors)"),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "pickle alone": (lambda m: each(m.glob("*.safetensors"), lambda p: p.rename(m / "m.bin")), "no pickle is loaded"),
    "an unknown kind": (lambda m: each(m.glob("config.json"), lambda p: p.write_text('{"model_type": "m"}')), "'m'"),
    "no folder": (shutil.rmtree, "does not exist"),
}  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder_that_cannot_be_trained_is_refused(home: Path, tmp_path: Path, case: str) -> None:
    broken, message = MODELS[case]
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    broken(model)
    path = write_recipe(home, "model.yaml", out=str(tmp_path / "out"))
    said = refused("train", path, f"model={model}")
    assert message in said and str(model) in said


@pytest.mark.usefixtures("no_model")
def test_a_context_or_a_budget_that_is_too_short_names_the_longest_prompt(home: Path, tmp_path: Path) -> None:
    path = write_recipe(home, "short.yaml", out=str(tmp_path / "out"))
    said = refused("train", path, "rollout.max_completion_length=500")
    assert "the model's context has 512" in said and "with the longest prompt of" in said
    said = refused("train", path, "optim.token_budget=20")
    assert "optim.token_budget = 20: the longest prompt (" in said and "raise it to at least that" in said
    said = refused("train", path, "eval.max_completion_length=510")
    assert "eval.max_completion_length = 510" in said and "lower it to" in said
    said = refused("train", path, "method=rlsd", "rollout.max_completion_length=480")
    assert "privileged prompt of" in said and "privilege.max_tokens" in said
    # What rollouts will make is evidence too: a demonstration is as long as a response may be.
    for kind in ("demonstration", "feedback"):
        rlsd = ["method=rlsd", f"privilege={kind}", "rollout.max_completion_length=245"]
        said = refused("train", path, *rlsd)
        assert "rollout.max_completion_length = 245: with the longest privileged prompt of" in said
        for enough in ("privilege={kind: %s, max_tokens: 20}", "privilege={kind: %s, max_prompt_length: 200}"):
            assert cli("train", path, "--dry-run", *rlsd, enough % kind).code == 0
    said = refused("train", path, "eval.max_completion_length=485")  # enough for the student, not for the teacher
    assert "eval.max_completion_length = 485: with the longest privileged prompt of" in said
    assert cli("train", path, "--dry-run", "eval.max_completion_length=485", "eval.controls=false").code == 0
    said = refused("train", path, "data.max_prompt_length=5")
    assert "data.max_prompt_length" in said and "raise it" in said


def test_weights_that_do_not_fit_the_config_are_refused_and_leave_no_run(home: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    path = write_recipe(home, "misfit.yaml", out=str(tmp_path / "out"))
    assert "lack" in refused("train", path, f"model={model}")
    shutil.copy(home / "model" / "config.json", model)
    # The same command, mended, begins: nothing was computed that could be lost.
    assert cli("train", path, f"model={model}", "optim.steps=1").code == 0


# Rewards.

REWARDS = {
    "wrong signature": ("def score(texts):\n    return [0.0]\n", "has no parameter `completions` (it has: texts)"),
    "a column that is not there": ("def score(completions, label):\n    return [0.0]\n", "'label', which is no column"),
    "no such function": ("def grade(completions):\n    return [0.0]\n", "no function 'score'"),
    "broken file": ("import nothing_of_that_name\n", "No module named 'nothing_of_that_name'"),
    "a syntax error": ("def score(\n", "SyntaxError"),
    "fails at once": ("def score(completions, **kw):\n    return [1 / 0]\n", "ZeroDivisionError"),
    "wrong length": ("def score(completions, **kw):\n    return []\n", "it returned 0 values for 1 completions"),
    "wrong type": ("def score(completions, **kw):\n    return ['good']\n", "returned str where a number"),
    "no file": (None, "there is no file"),
}  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", REWARDS)
def test_a_reward_that_cannot_be_called_is_refused(home: Path, tmp_path: Path, case: str) -> None:
    code, message = REWARDS[case]
    file = tmp_path / "reward.py"
    if code is not None:
        file.write_text(code)
    path = write_recipe(home, "reward.yaml", out=str(tmp_path / "out"), reward=f"{file}:score")
    said = refused("train", path)
    assert message in said and f"{file}:score" in said


@pytest.mark.usefixtures("no_model")
def test_a_verifier_that_does_not_fit_the_answers_is_refused(home: Path, tmp_path: Path) -> None:
    path = write_recipe(home, "verifier.yaml", out=str(tmp_path / "out"), reward="choice")
    assert "not a letter A to J" in refused("train", path)
    path = write_recipe(home, "verifier.yaml", out=str(tmp_path / "out"), reward="gym")
    assert "has no column `entry`" in refused("train", path)


# Folders and disks.


@pytest.fixture(scope="module")
def finished(home: Path) -> tuple[Path, Path]:
    path = write_recipe(home, "finished.yaml", out=str(home / "runs" / "finished"))
    assert cli("train", path).code == 0
    return path, home / "runs" / "finished"


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.usefixtures("no_model")
def test_a_folder_that_is_taken_is_refused_and_left_alone(
    home: Path, tmp_path: Path, finished: tuple[Path, Path]
) -> None:
    path, folder = finished
    before = stamps(folder)
    said = refused("train", path)
    assert "already holds a run; add --resume" in said
    said = refused("train", path, "--resume", "rollout.temperature=0.5")
    assert "rollout.temperature = 0.5" in said and "begun with 1.0" in said
    assert "already holds a run; add --resume" in refused("train", folder)
    assert "rollout.temperature = 0.5" in refused("train", folder, "--resume", "rollout.temperature=0.5")
    assert f"recipe {str(home)!r}: a folder that holds no run.yaml" in refused("train", home)
    assert "recipe '': neither a file nor a shipped recipe" in refused("train", "")
    assert stamps(folder) == before
    (tmp_path / "thesis.tex").write_text("years")
    assert "holds files that are no run's (thesis.tex)" in refused("train", path, f"out={tmp_path}")
    assert "is a file" in refused("train", path, f"out={tmp_path / 'thesis.tex'}")
    for name in ("x" * 300, '"a\\0b"'):  # which no disk can have
        assert "out: " in (said := refused("train", path, f"out={name}")) and "choose another" in said
    assert "File name too long" in cli("train", path, f"out={'x' * 300}", "--dry-run").out
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("damaged", ["", "- a\n", "model: [", "a: \xff"], ids=["empty", "list", "no YAML", "no UTF-8"])
def test_a_run_whose_recipe_is_damaged_is_not_gone_on_with(finished: tuple[Path, Path], tmp_path: Path,
                                                           damaged: str) -> None:
    path, folder = finished
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "run.yaml").write_bytes(damaged.encode("latin-1"))
    said = refused("train", path, f"out={copy}", "--resume")
    assert f"resume: {copy / 'run.yaml'} does not hold the recipe" in said and "restore it, or begin anew" in said


@pytest.mark.usefixtures("no_model")
def test_a_tracker_that_is_not_installed_is_refused_and_spoils_no_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.MODULES, "trackio", "no_such_package")
    path = write_recipe(home, "tracked.yaml", out=str(tmp_path / "deep" / "out"))
    for more in ((), ("--dry-run",)):
        said = refused("train", path, "report.to=[trackio]", *more)
        assert "report.to: trackio is not installed; pip install" in said
    assert not (tmp_path / "deep").exists()


def test_what_nobody_has_put_into_words_is_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/somewhere")

    monkeypatch.setattr(cli_module, "app", forbidden)
    said = refused("train")
    assert said.startswith("error: /somewhere: Permission denied; see that it exists")
    monkeypatch.undo()
    assert "File name too long; see that it exists" in refused("train", "x" * 300)


def test_a_python_callers_paths_are_as_good_as_text(home: Path) -> None:
    recipe = recipe_of(home)
    paths = {**recipe, "model": Path(recipe["model"]), "out": Path(recipe["out"]),
             "data": {**recipe["data"], "source": Path(recipe["data"]["source"])}}
    assert load_run(paths) == load_run(recipe)
    assert load_run({**recipe, "data": home / "mine.jsonl"}).data.source == str(home / "mine.jsonl")


@pytest.mark.usefixtures("no_model")
def test_a_read_only_folder_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(home, "readonly.yaml", out=str(tmp_path / "out"))
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **keywords: Any) -> None:
        if self == tmp_path / "out":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, *args, **keywords)

    monkeypatch.setattr(Path, "mkdir", read_only)
    said = refused("train", path)
    assert f"{tmp_path / 'out'} cannot be written (Read-only file system)" in said and "choose another folder" in said


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = checkpoints.save_file, []

    def full_at_first(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full_at_first)
    path = write_recipe(home, "full.yaml", out=str(tmp_path / "out"), optim={"steps": 4}, eval={"best": None})
    said = cli("train", path)
    assert said.code == 0, said.err
    assert "the checkpoint of step 2 could not be written" in said.out and "No space left on device" in said.out
    assert "the run goes on" in said.out
    assert [entry.name for entry in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-4"]
    assert len(lines(tmp_path / "out" / "metrics.jsonl")) == 5


def test_a_disk_without_room_for_weights_keeps_the_measures_and_says_so(home: Path, tmp_path: Path) -> None:
    path = write_recipe(home, "tight.yaml", out=str(tmp_path / "out"))

    def action() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return command("train", path)

    assert forked(action, tmp_path / "tight.log") == 2
    said = (tmp_path / "tight.log").read_text()
    assert "Traceback" not in said and "the checkpoint of step 2 could not be written" in said
    assert "final cannot be written" in said and "its last checkpoint failed too: free some space" in said
    folder = tmp_path / "out"
    assert len(lines(folder / "metrics.jsonl")) == 4 and (folder / "results.json").is_file()
    assert not (folder / "final").exists() and list((folder / "checkpoints").iterdir()) == []
    assert "begin anew with another out" in said and "--resume" not in said  # there is nothing to go on from


@pytest.mark.parametrize("lost", [0, 3])
def test_a_disk_that_was_full_during_an_evaluation_costs_the_results_and_not_the_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    from selftaught import evaluate

    append = evaluate.append_rows

    def full(path: Path, rows: list[dict[str, Any]]) -> None:
        if rows[0]["step"] == lost:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append(path, rows)

    monkeypatch.setattr(evaluate, "append_rows", full)
    path = write_recipe(home, "holes.yaml", out=str(tmp_path / "out"), report={"html": True})
    said = cli("train", path)
    assert said.code == 0, said.err
    assert said.out.count("results.json cannot be made: no completions to measure") == 1
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file() and "model:  " in said.out
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_final_that_failed_is_made_by_a_resume(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    path = write_recipe(home, "late.yaml", out=str(tmp_path / "out"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        said = refused("train", path)
    assert "the training is done and its checkpoint is whole: free some space" in said and "--resume" in said
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert cli("train", path, "--resume").code == 0
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    assert not list((tmp_path / "out").glob(".*"))


# The other commands.


def test_eval_without_what_it_needs_is_refused(home: Path, tmp_path: Path, finished: tuple[Path, Path]) -> None:
    path, folder = finished
    saved = folder / "completions.jsonl"
    assert "give a run's folder" in refused("eval")
    assert "say on what" in refused("eval", home / "model")
    assert "no/such.jsonl" in refused("eval", "--completions", "no/such.jsonl")
    for k in ("one", "1,,2", "1.5", "1 2"):
        assert "give whole numbers with commas, for example 1,4,8" in refused("eval", "--completions", saved, "--k", k)
    assert "only n = 2 samples of a problem" in refused("eval", "--completions", saved, "--k", "64")
    said = cli("eval", "--completions", saved, "--k", "1,64")
    assert said.code == 0 and "pass@1" in said.out and "k = 64: no problem has more than 2 samples" in said.err
    assert "k = 0: pass@k needs k of at least 1" in refused("eval", "--completions", saved, "--k", "0")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no completion in it" in refused("eval", "--completions", tmp_path / "empty.jsonl")
    said = refused("eval", "--completions", saved, "--json", tmp_path / "none" / "out.json")
    assert "cannot be written (No such file or directory)" in said
    assert "leave" in refused("eval", folder, "--completions", saved)
    assert "leave the model" in refused("eval", folder, "--compare", saved, saved)
    assert "leave --completions out" in refused("eval", "--completions", saved, "--compare", saved, saved)
    assert "name it with --completions" in refused("eval", folder, "--reward", "numeric")
    assert "--out names what --reward scores again" in refused("eval", "--completions", saved, "--out", tmp_path / "x")
    assert "--resume goes on with sampling" in refused("eval", "--completions", saved, "--resume")
    assert "raise eval.samples to 64" in refused("eval", folder, "--k", "64")
    assert "nothing to evaluate on" in refused("eval", folder, path, "data.heldout=0")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(folder / "run.yaml", unfinished)
    assert "has no final/ yet" in refused("eval", unfinished)


def test_report_and_methods_name_what_they_do_not_know(tmp_path: Path) -> None:
    assert "is no run folder" in refused("report", tmp_path)
    assert "unknown method 'rsld'; did you mean 'rlsd'?" in refused("methods", "rsld")
    for args in (("trian",), ("train",), ("train", "quickstart", "--resum"), ("report",)):
        said = cli(*args)
        assert said.code == 2 and said.err.startswith("Usage: selftaught") and "Traceback" not in said.err


def test_a_mistake_is_one_message_from_a_process_of_its_own_too(home: Path) -> None:
    command = [sys.executable, "-m", "selftaught.cli", "train", str(write_recipe(home, "own.yaml")), "optim.stepz=3"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SOURCES)}, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'optim.stepz'; did you mean 'steps'?\n"
