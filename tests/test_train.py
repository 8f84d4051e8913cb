"""The loop through its Python form: what a run is given reaches its numbers, and a run that learns nothing says so."""

from __future__ import annotations

import io
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import selftaught
from own import METHOD, cli, lines, make_home, recipe_of, without_clocks, write_recipe
from selftaught.assemble import shuffled
from selftaught.errors import UserError
from selftaught.measure import rollout_metrics
from selftaught.methods import batch_credit
from selftaught.optim import Checkpoints
from selftaught.records import Batch, Problem, Prompt, Rollout, Sampling, Verdict
from selftaught.rollout import TransformersEngine
from selftaught.run import load_run
from selftaught.score import Micro, Scorer
from selftaught.score.backbone import probe
from selftaught.tensors import pack
from selftaught.train import Finished
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("train"))


def trained(home: Path, name: str, **sections: Any) -> Finished:
    quiet = Console(quiet=True)
    return selftaught.train(recipe_of(home, out=str(home / "runs" / name), **sections), console=quiet)


def final(run: Finished) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "final" / "model.safetensors")


def metrics(run: Finished) -> list[dict[str, Any]]:
    return lines(run.folder / "metrics.jsonl")


def largest_gap(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


# The Python form.


def test_python_keywords_are_the_recipes_names_and_a_function_is_a_reward(home: Path) -> None:
    ours = recipe_of(home, out=str(home / "runs" / "python"))

    def short(completions: list[str], gold: list[str], **columns: Any) -> list[float]:
        return [1.0 if text == answer else 1 / (1 + len(text)) for text, answer in zip(completions, gold, strict=True)]

    run = selftaught.train(
        model=ours["model"], data=ours["data"], reward=short, method="grpo", rollout=ours["rollout"],
        optim={"steps": 3, "learning_rate": 1e-3}, eval={"samples": 2, "k": [1, 2]}, report={"to": []},
        out=ours["out"], seed=1, console=Console(quiet=True),
    )  # fmt: skip
    assert run.folder == Path(ours["out"]) and run.interrupted is None
    assert run.results["after"]["pass@1"]["value"] is not None and run.results["difference"]["problems"] == 6
    rewards = [row["reward"] for row in metrics(run)[1:]]
    assert len(rewards) == 3 and all(0 < reward < 1 for reward in rewards)
    assert run.run.seed == 1 and (run.folder / "final" / "config.json").is_file()


def test_a_lambda_is_a_reward_and_sections_take_the_place_of_a_recipes(home: Path) -> None:
    path = write_recipe(home, "base.yaml", out=str(home / "runs" / "unused"))
    quiet = Console(quiet=True)
    one = selftaught.train(path, reward=lambda completions, **kw: [len(set(text)) / 9 for text in completions],
                           out=str(home / "runs" / "lambda"), optim={"steps": 2}, console=quiet)  # fmt: skip
    assert [row["step"] for row in metrics(one)] == [0, 1, 2]
    assert one.run.optim.learning_rate == 1e-6 and not (home / "runs" / "unused").exists()
    again = selftaught.train(load_run(path), reward=lambda completions, **kw: [len(set(t)) / 9 for t in completions],
                             out=str(home / "runs" / "lambda-2"), console=quiet,
                             overrides=["optim.steps=2", "optim.learning_rate=1e-6"])  # fmt: skip
    assert [without_clocks(row) for row in metrics(again)] == [without_clocks(row) for row in metrics(one)]


def test_a_verdicts_feedback_and_status_reach_the_rollouts(home: Path) -> None:
    def judge(completions: list[str], **columns: Any) -> list[selftaught.Verdict]:
        return [selftaught.Verdict(0.25 * (len(text) % 4), status="unparsed", answer=text[:2]) for text in completions]

    run = selftaught.train(recipe_of(home, out=str(home / "runs" / "verdicts")), reward=judge, optim={"steps": 1},
                           console=Console(quiet=True))  # fmt: skip
    rows = lines(run.folder / "rollouts" / "step-1.jsonl")
    assert len(rows) == 8 and {row["status"] for row in rows} == {"unparsed"}
    for row in rows:
        assert (row["answer"], row["score"]) == (row["response"][:2], 0.25 * (len(row["response"]) % 4))
    assert metrics(run)[1]["reward/status/unparsed"] == 1.0


def test_the_same_run_twice_is_the_same_run_and_another_seed_another(home: Path) -> None:
    one, two = trained(home, "twice-1"), trained(home, "twice-2")
    assert largest_gap(final(one), final(two)) == 0.0
    assert [without_clocks(row) for row in metrics(one)] == [without_clocks(row) for row in metrics(two)]
    assert (one.folder / "completions.jsonl").read_bytes() == (two.folder / "completions.jsonl").read_bytes()
    assert largest_gap(final(one), final(trained(home, "twice-3", seed=1))) > 1e-4


# What must not matter, and what must.


@pytest.mark.parametrize("method", ["grpo", "rlsd", "opsd"])
def test_the_token_budget_changes_nothing_but_the_cut(home: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[int] = []
    split = Scorer.split

    def counted(self: Scorer, batch: Batch) -> list[Micro]:
        micros = list(split(self, batch))
        cuts.append(len(micros))
        return micros

    monkeypatch.setattr(Scorer, "split", counted)
    tokenizer = tiny_tokenizer()
    hint = "" if method == "grpo" else "Hint: the answer is 6.\n"  # every view of a rollout must fit
    prompts = [f"Question: {row['question']}\n{hint}Answer:" for row in lines(home / "mine.jsonl")]
    longest = max(len(tokenizer(prompt).input_ids) for prompt in prompts)
    small = trained(home, f"small-{method}", method={"name": method}, optim={"token_budget": longest + 10})
    assert min(cuts) >= 2
    cuts.clear()
    large = trained(home, f"large-{method}", method={"name": method}, optim={"token_budget": 100_000})
    assert set(cuts) == {1}
    assert largest_gap(final(small), final(large)) < 1e-5
    start = load_file(home / "model" / "model.safetensors")
    assert largest_gap(final(large), start) > 1e-4
    for one, other in zip(metrics(small)[1:], metrics(large)[1:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_recomputed_activations_give_the_same_losses(home: Path) -> None:
    kept = trained(home, "kept", method={"name": "rlsd"})
    again = trained(home, "recomputed", method={"name": "rlsd"}, optim={"activation_checkpointing": True})
    assert largest_gap(final(kept), final(again)) < 1e-6
    for one, other in zip(metrics(kept)[1:], metrics(again)[1:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-7)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_bfloat16_moves_its_weights_by_way_of_float32(home: Path) -> None:
    run = trained(home, "bfloat16", optim={"dtype": "bfloat16", "learning_rate": 1e-4, "steps": 4})
    weights, start = final(run), load_file(home / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    rounded = {name: tensor.bfloat16() for name, tensor in start.items()}
    assert 0 < largest_gap(weights, rounded) < 0.01
    saved = load_file(run.folder / "checkpoints" / "step-4" / "optimizer.safetensors")
    masters = {name.removeprefix("master/"): t for name, t in saved.items() if name.startswith("master/")}
    assert masters and all(tensor.dtype == torch.float32 for tensor in masters.values())
    assert all(masters[name].bfloat16().equal(tensor) for name, tensor in weights.items())
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.05 for row in metrics(run)[1:])


def test_a_chat_template_wraps_the_prompt_and_the_privilege(home: Path) -> None:
    run = trained(home, "chat", data={"template": "chat", "system_prompt": "Answer with a number."},
                  method={"name": "opsd"}, optim={"steps": 2})  # fmt: skip
    rows = lines(run.folder / "completions.jsonl")
    plain = next(row for row in rows if row["arm"] == "student")["prompt"]
    assert plain.startswith("<|im_start|>system\nAnswer with a number.<|im_end|>\n<|im_start|>user\n")
    assert plain.endswith("<|im_end|>\n<|im_start|>assistant\n") and "Hint" not in plain
    taught = next(row for row in rows if row["arm"] == "teacher/right")
    assert f"\n\nHint: the answer is {taught['reference']}.<|im_end|>" in taught["prompt"]
    assert largest_gap(final(run), load_file(home / "model" / "model.safetensors")) > 1e-4


def test_metrics_are_what_the_saved_rollouts_say(home: Path) -> None:
    run = trained(home, "numbers", method={"name": "rlsd"})
    for row in metrics(run)[1:]:
        rollouts = lines(run.folder / "rollouts" / f"step-{row['step']}.jsonl")
        scores = [r["score"] for r in rollouts]
        assert len(rollouts) == 8 and len({r["problem"] for r in rollouts}) == 2
        assert row["reward"] == pytest.approx(sum(scores) / 8, abs=1e-6)
        assert row["completions/tokens"] == sum(r["tokens"] for r in rollouts)
        groups = [[r["score"] for r in rollouts if r["problem"] == name] for name in {r["problem"] for r in rollouts}]
        assert row["reward_std"] == pytest.approx(sum(map(statistics.stdev, groups)) / 2, abs=1e-6)
        assert row["completions/clipped_ratio"] == sum(r["finish"] == "length" for r in rollouts) / 8
        assert row["completions/max_length"] == max(r["tokens"] for r in rollouts)
        alive = len({r["problem"] for r in rollouts for s in rollouts
                     if r["problem"] == s["problem"] and abs(r["score"] - s["score"]) > 1e-9})  # fmt: skip
        assert row["frac_reward_zero_std"] == pytest.approx(1 - alive / 2)
        assert row["learning_rate"] == 1e-3 and math.isfinite(row["loss"])


def test_the_spread_of_rewards_is_within_groups_and_no_opinion_is_left_out() -> None:
    def found(**scores: tuple[float | None, ...]) -> dict[str, float]:
        rollouts = [Rollout(Problem(name, "?"), i, Prompt((1,)), (5, 6), (0.0, 0.0), "", "stop", Sampling(), 0, 0)
                    for name, values in scores.items() for i in range(len(values))]  # fmt: skip
        return rollout_metrics(rollouts, [Verdict(value) for values in scores.values() for value in values])

    assert found(a=(0.0, 0.0, 0.0), b=(1.0, 1.0, 1.0))["reward_std"] == 0.0
    assert found(a=(0.0, 1.0, None), b=(2.0, 6.0, 4.0))["reward_std"] == pytest.approx((math.sqrt(0.5) + 2) / 2)
    assert found(a=(0.0, 2.0), b=(None, None))["reward_std"] == pytest.approx(math.sqrt(2))
    assert found(a=(3.0,))["reward_std"] == 0.0
    assert "reward_std" not in found(a=(None, None))


def test_without_a_reward_there_is_nothing_that_was_wrong(home: Path) -> None:
    run = trained(home, "silent", method={"name": "opsd"}, reward=None, data={"heldout": 0}, optim={"steps": 1})
    (row,) = metrics(run)
    assert row["completions/tokens"] > 0 and not [name for name in row if name.startswith("reward")]


def test_shuffled_rewards_keep_score_and_status_together() -> None:
    verdicts = [Verdict(float(i), "right" if i % 3 else "wrong", answer=str(i)) for i in range(30)]
    dealt = shuffled(verdicts, 0, 4)
    pairs = [(verdict.score, verdict.status) for verdict in dealt]
    assert sorted(pairs) == sorted((verdict.score, verdict.status) for verdict in verdicts)
    assert pairs != [(verdict.score, verdict.status) for verdict in verdicts]
    assert [verdict.answer for verdict in dealt] == [verdict.answer for verdict in verdicts]
    assert shuffled(verdicts, 0, 4) == dealt != shuffled(verdicts, 0, 5)


def test_a_teacher_arm_holds_only_problems_that_have_a_privilege(home: Path) -> None:
    rows = lines(home / "mine.jsonl")
    for number, row in enumerate(rows):
        row["clue"] = f"clue {number}" if number % 2 else ""
    (home / "clues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trained(home, "clues", data={"source": str(home / "clues.jsonl")}, optim={"steps": 1},
                  privilege={"kind": "hint", "column": "clue"})  # fmt: skip
    saved = lines(run.folder / "completions.jsonl")
    asked = {arm: {row["problem"] for row in saved if row["arm"] == arm} for arm in {row["arm"] for row in saved}}
    assert len(asked["student"]) == len(asked["other_prompt"]) == len(asked["teacher/empty"]) == 6
    assert 0 < len(asked["teacher/right"]) < 6
    assert all("clue" in row["prompt"] for row in saved if row["arm"] in ("teacher/right", "teacher/wrong"))


def test_one_held_out_problem_has_no_other_prompt(home: Path) -> None:
    run = trained(home, "alone", data={"heldout": 1}, optim={"steps": 1})
    arms = {row["arm"] for row in lines(run.folder / "completions.jsonl")}
    assert "other_prompt" not in arms and "other_prompt" not in run.results["controls"]


def test_greedy_evaluation_gives_one_answer_however_often_it_is_asked(home: Path) -> None:
    run = trained(home, "greedy", eval={"temperature": 0}, optim={"steps": 1})
    said: dict[tuple[str, int], set[str]] = {}
    for row in lines(run.folder / "completions.jsonl"):
        if row["arm"] == "student":
            said.setdefault((row["problem"], row["step"]), set()).add(row["response"])
    assert len(said) == 12 and all(len(responses) == 1 for responses in said.values())


def test_the_teacher_that_a_run_keeps_follows_its_snapshot(home: Path) -> None:
    run = trained(home, "snapshot", method={"name": "rlsd", "teacher": {"weights": "snapshot", "every": 2}},
                  optim={"steps": 4})  # fmt: skip
    distances = [row["teacher/snapshot/distance"] for row in metrics(run)[1:]]
    assert distances[0] > 0 and distances[2] > 0 and distances[1] == distances[3] == 0


def test_the_best_checkpoint_by_the_recipes_measure_stays(home: Path) -> None:
    def late(completions: list[str], **columns: Any) -> list[float]:
        return [1.0 if len(text) > 3 else 0.1 * len(text) for text in completions]

    quiet = Console(quiet=True)
    run = selftaught.train(
        recipe_of(home, out=str(home / "runs" / "best")), reward=late, optim={"steps": 6, "learning_rate": 3e-3},
        checkpoint={"every": 1, "keep": 1}, eval={"every": 1, "samples": 4, "k": [1]}, console=quiet)  # fmt: skip
    measured = {row["step"]: row["eval/pass@1"] for row in metrics(run) if row["step"]}
    best = max(measured, key=lambda step: (measured[step], -step))
    assert run.results["best"] == {"step": best, "measure": "pass@1", "value": measured[best]}
    kept = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert kept == {f"step-{best}", "step-6"}


def test_a_checkpoint_is_written_only_once_its_step_is_logged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run killed between the two would be resumed without that step's line."""
    save, found = Checkpoints.save, []

    def watched(self: Checkpoints, step: int, *rest: Any) -> Path | None:
        logged = [row["step"] for row in lines(self.folder.parent / "metrics.jsonl")]
        measured = {row["step"] for row in lines(self.folder.parent / "completions.jsonl")}
        found.append((step, logged, step in measured))
        return save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", watched)
    trained(home, "ordered", eval={"every": 1}, checkpoint={"every": 2}, optim={"steps": 3})
    assert [step for step, _, _ in found] == [1, 2, 3]  # the first is the best so far, the last ends the run
    assert all(logged == list(range(step + 1)) and measured for step, logged, measured in found)


def test_a_method_of_the_users_own_file_trains(home: Path) -> None:
    (home / "my_method.py").write_text(METHOD)
    run = trained(home, "own-method", method={"name": f"{home / 'my_method.py'}:Mine", "scale": 2.0})
    assert all(row["grad_norm"] > 0 and 0 < row["method/weight"] < 1 for row in metrics(run)[1:])
    assert largest_gap(final(run), load_file(home / "model" / "model.safetensors")) > 1e-4


# Law 9: a dead step says so.


def test_a_constant_reward_is_named_and_stops_the_run_with_everything_saved(home: Path) -> None:
    (home / "constant.py").write_text("def score(completions, **kw):\n    return [0.5] * len(completions)\n")
    path = write_recipe(home, "constant.yaml", out=str(home / "runs" / "constant"), report={"patience": 3},
                        reward=f"{home / 'constant.py'}:score", optim={"steps": 9},
                        checkpoint={"every": 100})  # fmt: skip
    said = cli("train", path)
    assert said.code == 2 and "Traceback" not in said.err
    assert said.out.count("in every group all rollouts scored the same") == 1
    assert "stopped after 3 dead steps in a row" in said.err and "rollout.num_generations" in said.err
    rows = lines(home / "runs" / "constant" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["health/dead_groups"] == 1.0 and row["frac_reward_zero_std"] == 1.0 for row in rows[1:])
    assert (home / "runs" / "constant" / "checkpoints" / "step-3" / "manifest.json").is_file()
    said = cli("train", path, "--resume", "report.patience=5")
    assert said.code == 2 and "stopped after 5 dead steps in a row" in said.err
    rows = lines(home / "runs" / "constant" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]  # the three dead ones before the resume count


@pytest.mark.parametrize(
    ("function", "metric", "sentence"),
    [
        (lambda completions, **kw: [None] * len(completions), "no_reward", "the reward had no opinion (None)"),
        # The trial before the run is of an answer, a number; the model writes other things.
        (lambda completions, **kw: [float(text) * 0 for text in completions], "reward_failed", "the reward failed"),
    ],
    ids=["silent", "broken"],
)
def test_a_reward_that_says_nothing_or_fails_is_named(home: Path, function: Any, metric: str, sentence: str) -> None:
    console, name = Console(record=True, file=io.StringIO()), metric
    with pytest.raises(UserError, match="dead steps in a row"):
        selftaught.train(recipe_of(home, out=str(home / "runs" / name), report={"patience": 2}, data={"heldout": 0}),
                         reward=function, console=console)  # fmt: skip
    assert sentence in console.export_text()
    rows = lines(home / "runs" / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row[f"health/{metric}"] == 1.0 for row in rows)


def test_responses_cut_off_and_a_teacher_that_adds_nothing_are_named(home: Path) -> None:
    run = trained(home, "cut", rollout={"max_completion_length": 2, "stop": []}, method={"name": "opsd"},
                  privilege={"kind": "empty"}, optim={"steps": 1})  # fmt: skip
    assert metrics(run)[1]["health/cut_off"] == 1.0
    assert metrics(run)[1]["health/silent_teacher"] == 1.0


# Law 6: one distribution.


def test_a_sampler_that_is_not_the_scorers_distribution_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TransformersEngine.poll

    def shifted(self: TransformersEngine) -> list[Rollout]:
        return [replace(r, logp_sampler=tuple(p - 0.5 for p in r.logp_sampler)) for r in original(self)]

    monkeypatch.setattr(TransformersEngine, "poll", shifted)
    with pytest.raises(UserError, match=r"differ from the scorer's by 0\.5 nats.*max_logp_gap = 0\.1"):
        trained(home, "shifted")
    assert [row["step"] for row in lines(home / "runs" / "shifted" / "metrics.jsonl")] == [0]
    allowed = trained(home, "allowed", rollout={"max_logp_gap": 0.6}, optim={"steps": 1})
    assert metrics(allowed)[1]["sampling/sampling_logp_difference/mean"] == pytest.approx(0.5, abs=1e-4)


def test_what_was_done_before_a_refused_step_is_saved_and_gone_on_with(home: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    original = TransformersEngine.poll

    def shifted(self: TransformersEngine) -> list[Rollout]:
        shift = 0.5 if self.version == 2 else 0.0
        return [replace(r, logp_sampler=tuple(p - shift for p in r.logp_sampler)) for r in original(self)]

    sections: dict[str, Any] = {"optim": {"steps": 4}, "checkpoint": {"every": 100}, "eval": {"best": None},
                                "method": {"name": "opsd"}}
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "poll", shifted)
        with pytest.raises(UserError, match="nats on average"):
            trained(home, "refused", **sections)
    assert (home / "runs" / "refused" / "checkpoints" / "step-2" / "manifest.json").is_file()
    again = selftaught.train(recipe_of(home, out=str(home / "runs" / "refused"), **sections), resume=True,
                             console=Console(quiet=True))
    whole = trained(home, "unrefused", **sections)
    assert [without_clocks(row) for row in metrics(again)] == [without_clocks(row) for row in metrics(whole)]
    assert largest_gap(final(again), final(whole)) == 0.0


@pytest.mark.parametrize("update", [0, 1])
def test_a_step_that_is_refused_after_its_first_update_is_not_saved_as_the_one_before(
    home: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    calls: list[int] = []

    def broken(method: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        calls.append(batch.step)
        if calls.count(1) == update + 1:
            raise UserError("method 'mine': its credit")
        return batch_credit(method, batch, *rest, **named)

    sections: dict[str, Any] = {"optim": {"steps": 2, "minibatches": 2}, "checkpoint": {"every": 100},
                                "eval": {"best": None}}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["selftaught.train"], "batch_credit", broken)
        with pytest.raises(UserError, match="its credit"):
            trained(home, f"half-{update}", **sections)
    saved = Checkpoints(home / "runs" / f"half-{update}" / "checkpoints", 9).steps()
    assert saved == ([] if update else [1])
    again = selftaught.train(recipe_of(home, out=str(home / "runs" / f"half-{update}"), **sections), resume=True,
                             console=Console(quiet=True))
    assert largest_gap(final(again), final(trained(home, f"unbroken-{update}", **sections))) == 0.0


def test_truncated_sampling_trains_where_it_is_allowed_and_says_what_is_not_checked(home: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=200)
    run = selftaught.train(
        recipe_of(home, out=str(home / "runs" / "truncated"), rollout={"top_k": 5, "allow_truncated_support": True}),
        console=console)  # fmt: skip
    assert len(metrics(run)) == 4
    assert all(row["sampling/sampling_logp_difference/mean"] > 0.1 and row["grad_norm"] > 0 for row in metrics(run)[1:])
    assert console.export_text().count("rollout.max_logp_gap cannot be checked") == 1


@pytest.mark.parametrize("length", [5, 64, 65, 4000])
@pytest.mark.parametrize("written", [1, 2, 500])
def test_the_probe_before_a_run_is_short_whatever_the_prompts(length: int, written: int) -> None:
    given = [(*range(24), *range(start, start + max(length - 24, 0)))[:length] for start in (100, 9000)]
    prompts, responses = probe(given, written)
    assert len(prompts) == len(responses) == 4 and set(map(len, prompts)) == {min(length, 64)}
    assert all(1 <= len(response) <= min(16, written) for response in responses)
    packed = pack(prompts, responses)
    distinct = 2 if written > (1 if length > 24 else 3) else 1  # equal responses are one; one of one token has no input
    assert [len(group.responses) for group in packed.groups] == [distinct] * (2 if length > 24 else 1)
    assert packed.common == (24 if length > 24 else 0)  # what they share is still computed once
    assert [prompt[-min(length, 40):] for prompt in prompts[:2]] == [ids[-min(length, 40):] for ids in given]


def test_run_yaml_is_the_resolved_recipe_and_a_recipe_again(home: Path) -> None:
    run = trained(home, "again", optim={"steps": 1})
    assert load_run(run.folder / "run.yaml") == run.run
    assert json.loads((run.folder / "versions.json").read_text())["torch"] == torch.__version__
