"""Leakage of real (tiny) models: against plain forward passes, while training, and from a saved run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import selftaught
from own import cli, lines, make_home, recipe_of, without_clocks
from selftaught import leakage, privilege
from selftaught.assemble import Ground, assemble, lay_ground, load_engine
from selftaught.errors import UserError
from selftaught.eval import LeakageConfig, append_rows, rows_of, summarise_leakage
from selftaught.evaluate import EVALUATION
from selftaught.leakage import Models, Watch, first_of, leakage_metrics, rollouts_of, score, temperature_of
from selftaught.learned import backbone_of, score_rows
from selftaught.records import Request, Rollout, Sampling, Verdict
from selftaught.run import load_run
from selftaught.score import Backbone


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights wide enough that a privilege moves the distributions."""
    return make_home(tmp_path_factory.mktemp("leak"), initializer_range=0.3)


@pytest.fixture(scope="module")
def ground(home: Path) -> Ground:
    run = load_run(recipe_of(home, data={"heldout": 0}))
    return lay_ground(run.model_copy(update={"reward": None}), lambda line: None)


@pytest.fixture(scope="module")
def sampled(ground: Ground) -> tuple[Backbone, list[Rollout], list[Verdict]]:
    backbone, engine = load_engine(ground)
    problems = ground.dataset.train[:3]
    asked = [Request(problem, ground.renderer.prompt(problem), 0, 0) for problem in problems]
    rollouts = engine.sample(asked, 4, Sampling(max_completion_length=8))
    return backbone, rollouts, [Verdict(float(i % 4 < 3), "right" if i % 4 < 3 else "wrong") for i in range(12)]


def dense(backbone: Backbone, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of `ids` after `prompt` by one plain forward pass of the model."""
    with torch.no_grad():
        logits = backbone.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def shown(ground: Ground, rollout: Rollout, kind: Any, step: int = EVALUATION) -> Any:
    config = privilege.control(leakage.config_of(ground), kind)
    (one,) = privilege.for_problems(config, [rollout.problem], ground.dataset.train, ground.renderer, seed=0, step=step)
    return one


def test_every_view_is_the_models_own_forward_pass_under_that_prompt(ground: Ground, sampled: Any) -> None:
    backbone, rollouts, verdicts = sampled
    found = score(ground, Models(backbone), rollouts, verdicts, LeakageConfig(demonstrations=2))
    for one, rollout in zip(found, rollouts, strict=True):
        ids = leakage.written(rollout)
        if not ids:
            assert one.logp == {}
            continue
        prompts = {"student": rollout.prompt, "reference": rollout.prompt,
                   "reference/wrong": shown(ground, rollout, "wrong").prompt,
                   "teacher/other_problem": shown(ground, rollout, "other_problem", EVALUATION - 1).prompt}  # fmt: skip
        prompts |= {f"teacher/{kind}": shown(ground, rollout, kind).prompt for kind in ("right", "wrong", "empty")}
        for name, prompt in prompts.items():
            expected = dense(backbone, prompt.token_ids, ids)
            torch.testing.assert_close(torch.tensor(one.logp[name]), expected, atol=2e-5, rtol=0)
        assert (one.logp["teacher/empty"] == one.logp["student"]).all()  # null teacher: exactly no gap
        assert one.privilege == rollout.problem.answer and one.answers == (rollout.problem.answer,)
        assert {i for a, b in one.spans for i in range(a, b)} == set(range(len(one.response)))
        assert one.entropy is not None and (one.entropy > 0).all()
    gaps = summarise_leakage(found, LeakageConfig())
    assert abs(gaps["gap/right"]["value"]) > 1e-3 and gaps["gap/empty"]["value"] == 0


def test_demonstrations_are_a_problems_right_responses_with_their_repeats_the_same_for_all(
    ground: Ground, sampled: Any
) -> None:
    backbone, rollouts, verdicts = sampled
    again = next(i for i, one in enumerate(rollouts) if one.text.strip() and verdicts[i].status == "right")
    rollouts, verdicts = [*rollouts, replace(rollouts[again], sample=4)], [*verdicts, verdicts[again]]
    found = score(ground, Models(backbone), rollouts, verdicts, LeakageConfig(demonstrations=9))
    config = privilege.PrivilegeConfig(kind="demonstration")
    for one, rollout in zip(found, rollouts, strict=True):
        ids = leakage.written(rollout)
        texts = [other.text.strip() for other, judged in zip(rollouts, verdicts, strict=True)
                 if other.problem == rollout.problem and judged.status == "right" and other.text.strip()]
        have = [name for name in one.logp if name.startswith("demonstration/")]
        assert len(have) == (len(texts) if ids else 0), texts
        if not ids:
            continue
        expected = sorted(
            float(dense(backbone, ground.renderer.privileged(rollout.problem, config.block(text), []).token_ids,
                        ids).sum()) for text in texts)  # fmt: skip
        assert sorted(float(one.logp[name].sum()) for name in have) == pytest.approx(expected, abs=1e-3)
    some = leakage.contexts(ground, rollouts, verdicts, 2, None)
    for problem in {rollout.problem.id for rollout in rollouts}:
        mine = [i for i, rollout in enumerate(rollouts) if rollout.problem.id == problem]
        shown = [[some[f"demonstration/0{n}"][i] for n in (0, 1)] for i in mine]
        assert all(each == shown[0] for each in shown) and len(some) == 6


def test_the_reference_is_the_first_model_whatever_the_student_became(ground: Ground, home: Path, sampled: Any) -> None:
    backbone, rollouts, verdicts = sampled
    student = backbone_of(ground.run, str(home / "model"))
    first = {name: value.detach().clone() for name, value in student.model.named_parameters()}
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(0.7)
    config = LeakageConfig()
    own = score(ground, Models(backbone), rollouts, verdicts, config)
    for models in (Models(student, first=backbone), Models(student, initial=first)):
        other = score(ground, models, rollouts, verdicts, config)
        for one, two in zip(own, other, strict=True):
            for name in one.logp:
                same = bool(abs(one.logp[name] - two.logp[name]).max() < 1e-5)
                assert same == name.startswith("reference"), name
    taught = score(ground, Models(student, first=backbone), rollouts, verdicts, LeakageConfig(teacher="initial"))
    name = "teacher/right"
    assert all(abs(a.logp[name] - b.logp[name]).max() < 1e-5 for a, b in zip(own, taught, strict=True) if a.logp)


def test_first_of_takes_whole_problems_in_order(sampled: Any) -> None:
    _, rollouts, verdicts = sampled
    kept, judged = first_of(rollouts, verdicts, LeakageConfig(problems=2, samples=3))
    assert [(rollouts.index(one), verdict) for one, verdict in zip(kept, judged, strict=True)] == [
        (i, verdicts[i]) for i in (0, 1, 2, 4, 5, 6)]


# Saved completions.


def test_saved_rows_become_the_rollouts_that_they_were(ground: Ground, sampled: Any) -> None:
    _, rollouts, verdicts = sampled
    texts = [ground.tokenizer.decode(list(rollout.prompt.token_ids)) for rollout in rollouts]
    rows = rows_of(rollouts, verdicts, model="m", seed=0, step=3, prompts=texts)
    said: list[str] = []
    again, judged = rollouts_of(ground, rows, said.append)
    assert [one.text for one in again] == [one.text for one in rollouts]
    assert [one.prompt for one in again] == [one.prompt for one in rollouts]
    assert [ground.tokenizer.decode(list(one.token_ids)) for one in again] == [one.text for one in rollouts]
    assert [one.status for one in judged] == [one.status for one in verdicts]
    foreign = [{**rows[0], "problem": "elsewhere"}]
    rollouts_of(ground, [*rows, *foreign], said.append)
    assert any("1 of 13 completions left out" in line for line in said)
    with pytest.raises(UserError, match="none of the saved completions"):
        rollouts_of(ground, foreign, said.append)
    with pytest.raises(UserError, match="1 of 12 completions were sampled from another prompt"):
        rollouts_of(ground, [{**rows[0], "prompt": "what?"}, *rows[1:]], said.append)
    with pytest.raises(UserError, match="several temperatures"):
        temperature_of([rollouts[0], replace(rollouts[1], sampling=Sampling(temperature=0.5))])
    assert temperature_of([replace(rollouts[0], sampling=Sampling(temperature=0.0))]) == 1.0


def test_views_are_scored_at_the_temperature_that_was_sampled_at(ground: Ground, sampled: Any) -> None:
    backbone, rollouts, verdicts = sampled
    texts = [ground.tokenizer.decode(list(rollout.prompt.token_ids)) for rollout in rollouts]
    cool = [replace(rollout, sampling=Sampling(temperature=0.5)) for rollout in rollouts]
    rows = rows_of(cool, verdicts, model="m", seed=0, step=0, prompts=texts)
    found = score_rows(ground, Models(backbone), rows, LeakageConfig(), lambda line: None)
    for one in found[:3]:
        if one.logp:
            with torch.no_grad():
                prompt, ids = one.ids[2], one.ids[0]
                logits = backbone.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.5
            own = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.logp["student"]), own, atol=5e-5, rtol=0)


# Runs.


def trained(home: Path, name: str, steps: int = 4, resume: bool = False, **leak: Any) -> Path:
    out = home / "runs" / name
    selftaught.train(recipe_of(home, out=str(out), optim={"steps": steps, "learning_rate": 3e-3}, data={"heldout": 4},
                               eval={"controls": False, "leakage": leak}, method={"name": "grpo"}),
                     console=Console(quiet=True), resume=resume)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def watched(home: Path) -> Path:
    return trained(home, "watched", every=2, problems=1, samples=2)


def leaks(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name.startswith("leakage/")}
            for row in lines(folder / "metrics.jsonl")]


def test_a_watched_run_is_the_same_run_with_more_metrics(home: Path, watched: Path) -> None:
    plain = trained(home, "plain")
    assert all((a == b).all() for a, b in zip(load_file(plain / "final/model.safetensors").values(),
                                              load_file(watched / "final/model.safetensors").values(), strict=True))
    rows = [{name: value for name, value in row.items() if not name.startswith("leakage/")}
            for row in lines(watched / "metrics.jsonl")]  # fmt: skip
    assert [without_clocks(row) for row in lines(plain / "metrics.jsonl")] == [without_clocks(row) for row in rows]
    found = leaks(watched)
    assert [bool(row) for row in found] == [False, False, True, False, True] and not any(leaks(plain))
    assert found[2]["leakage/gap/empty"] == 0 and abs(found[2]["leakage/gap/right"]) > 0
    assert {"leakage/evidence", "leakage/leaning", "leakage/mention", "leakage/pcmi"} <= found[4].keys()
    assert all(math.isfinite(value) for row in found for value in row.values())


@pytest.mark.parametrize("method", ["grpo", "sdpg"])
def test_a_watch_holds_the_weights_that_the_run_began_with(home: Path, sampled: Any, method: str) -> None:
    first, rollouts, verdicts = sampled
    run = load_run(recipe_of(home, method={"name": method}, data={"heldout": 0}, eval={"leakage": {"every": 2}}))
    parts = assemble(lay_ground(run.model_copy(update={"reward": None}), lambda line: None))
    watch = Watch.of(parts)
    assert watch is not None
    with torch.no_grad():
        for parameter in parts.backbone.model.parameters():
            parameter.mul_(0.7)
    found = watch.metrics(rollouts, verdicts, 1)
    config = run.eval.leakage
    other = score(parts.ground, Models(parts.backbone, first=first), rollouts, verdicts, config, room=parts.ground.room)
    expected = leakage_metrics(other, config)
    assert found.keys() - expected.keys() == {"time/leakage"}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    own = leakage_metrics(score(parts.ground, Models(parts.backbone), rollouts, verdicts, config), config)
    assert abs(own["leakage/evidence"] - expected["leakage/evidence"]) > 1e-3
    assert watch.metrics(rollouts, verdicts, 0) == {}


def test_a_resumed_run_compares_with_the_weights_that_it_began_with(home: Path, watched: Path) -> None:
    out = home / "runs" / "resumed"
    shutil.copytree(watched, out)
    shutil.rmtree(out / "checkpoints" / "step-4")
    shutil.rmtree(out / "final")
    (out / "results.json").unlink()
    trained(home, "resumed", resume=True, every=2, problems=1, samples=2)
    assert leaks(out) == leaks(watched)


def test_a_saved_run_is_measured_before_and_after(home: Path, watched: Path, tmp_path: Path) -> None:
    rows = lines(watched / "completions.jsonl")
    said = cli("eval", watched, "eval.leakage.problems=3", "--leakage", "--diversity", "--json", tmp_path / "o.json")
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["leakage"]["after"]["problems"] == 3 and found["leakage"]["after"]["samples"] == 6
    assert found["leakage"]["before"]["gap/empty"]["value"] == 0
    assert found["leakage"]["difference"]["flagged"] is False and "too few problems, 3, to tell" in said.out
    assert found["diversity"]["after"]["token_entropy"] > 0 and "by position" in said.out
    assert lines(watched / "completions.jsonl") == rows  # nothing was sampled
    assert json.loads((watched / "measures.json").read_text()) == found
    assert cli("eval", watched, "eval.leakage.problems=3", "--diversity").code == 0  # the other part stays
    kept = json.loads((watched / "measures.json").read_text())
    entropy = [each["diversity"]["after"].pop("token_entropy") for each in (kept, found)]
    assert kept["leakage"] == found["leakage"] and entropy[0] == pytest.approx(entropy[1], abs=1e-6)
    found["diversity"]["after"]["token_entropy"] = entropy[1]
    (watched / "measures.json").write_text(json.dumps(found))
    spoken = sum(row["response"] != "" for row in [row for row in rows if row["step"] == 4][:6])
    assert found["diversity"]["after"]["token_entropy_responses"] == spoken
    assert f"over the tokens of {spoken} of 8 responses" in said.out
    assert cli("report", watched, "--pictures", "--out", tmp_path / "drawn").code == 0
    assert {"entropy-by-position", "leakage-controls"} <= {path.stem for path in (tmp_path / "drawn").iterdir()}
    # The same by hand: what was said before training, under the model that the run began with.
    run = load_run(str(watched / "run.yaml"), ["eval.leakage.problems=3"])
    before = [row for row in rows if row["step"] == 0]
    ground = lay_ground(run.model_copy(update={"reward": None}), lambda line: None)
    backbone = backbone_of(run, run.model)
    scored = score_rows(ground, Models(backbone, backbone), before, run.eval.leakage, lambda line: None)
    own = summarise_leakage(scored, run.eval.leakage)
    for name in ("gap/right", "evidence", "pcmi"):
        assert found["leakage"]["before"][name]["value"] == pytest.approx(own[name]["value"], abs=1e-5)


def test_a_student_that_leans_is_flagged_on_the_command_line(watched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "leaning"
    shutil.copytree(watched, folder)
    rows = lines(folder / "completions.jsonl")
    (folder / "completions.jsonl").unlink()
    run = load_run(str(watched / "run.yaml"))
    problems = lay_ground(run.model_copy(update={"reward": None}), lambda line: None).dataset.train[:6]
    append_rows(folder / "completions.jsonl", [
        {**next(row for row in rows if row["step"] == step), "problem": problem.id, "prompt": None, "response": text}
        for step, text in ((0, "3"), (4, "As the hint says: 3")) for problem in problems])  # fmt: skip
    said = cli("eval", folder, "eval.leakage.problems=6", "--leakage")
    assert said.code == 0 and "LEAKAGE: " in said.out and "p = 0.031" in said.out, said.err + said.out
    said = cli("eval", folder, "eval.leakage.problems=5", "--leakage")
    assert "too few problems, 5, to tell" in said.out, said.err + said.out


def test_what_cannot_be_measured_is_refused(watched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(watched, folder)
    shutil.rmtree(folder / "final")
    assert "no final/ yet" in cli("eval", folder, "--leakage").err
    said = cli("eval", folder, "--diversity")  # texts are measured all the same
    assert said.code == 0 and "token entropy is left out, which needs the model: eval: the run" in said.out + said.err
    assert "text_differ/all" in said.out and "token entropy, after: not known from texts alone" in said.out
    assert "is no run's folder" in cli("eval", tmp_path, "--leakage").err
    assert "another prompt" in cli("eval", watched, "data.answer=A", "--leakage").err
