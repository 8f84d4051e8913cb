"""GRPO's accepted practice in the trainer: dead groups drawn anew, truncated rollouts masked, several updates on one
rollout batch, the sampler corrected for, every reduction. Against closed forms and dense float64 by hand.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import selftaught
from own import lines, make_home, recipe_of, without_clocks
from selftaught.assemble import Parts, assemble, lay_ground, make_batch, requests, sample_and_verify
from selftaught.batches import cut, pick
from selftaught.data import Cursor
from selftaught.errors import UserError
from selftaught.loss import chunked_loss, clip_ratio
from selftaught.measure import live_groups
from selftaught.methods import batch_credit
from selftaught.optim import Optimizer
from selftaught.records import Batch, Problem, Prompt, Rollout, Sampling, Verdict
from selftaught.rollout import TransformersEngine
from selftaught.run import load_run, make_run
from selftaught.score import Scorer
from selftaught.session import Session
from selftaught.train import Finished
from tiny import save_tiny

STEPS = 3
REWARDS = """\
def varied(completions, **columns):
    return [len(set(text)) / 10 for text in completions]

def only_level_2(completions, level, **columns):
    return [len(set(text)) / 10 if one == 2 else 0.5 for text, one in zip(completions, level)]

def all_right(completions, **columns):
    return [1.0] * len(completions)

def nobody(completions, **columns):
    return [0.5] * len(completions)

def rank(completions, **columns):
    return [len(text) + len(set(text)) / 100 + sum(map(ord, text)) / 1e5 for text in completions]
"""  # in a file of its own, so that a worker does not import torch


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("practice"))
    (home / "rewards.py").write_text(REWARDS)
    return home


def trained(home: Path, name: str, reward: str = "varied", *, resume: bool = False, **sections: Any) -> Finished:
    ours = {"data": {"heldout": 0}, "eval": {"best": None}, "reward": scored_by(home, reward), **sections}
    recipe = recipe_of(home, out=str(home / "runs" / name), **ours)
    return selftaught.train(recipe, resume=resume, console=Console(quiet=True))


def scored_by(home: Path, reward: str) -> dict[str, Any]:
    """The sum of these, as in "one+other"; right is what the first says."""
    return {"parts": [{"name": f"{home / 'rewards.py'}:{name}"} for name in reward.split("+")], "workers": 1}


def weights(run: Finished) -> dict[str, Tensor]:
    return load_file(run.folder / "final" / "model.safetensors")


def start(home: Path) -> dict[str, Tensor]:
    return load_file(home / "model" / "model.safetensors")


def metrics(run: Finished) -> list[dict[str, Any]]:
    return [row for row in lines(run.folder / "metrics.jsonl") if row["step"]]


def rollouts_of(run: Finished, step: int) -> list[dict[str, Any]]:
    return lines(run.folder / "rollouts" / f"step-{step}.jsonl")


def largest_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def scores_by_problem(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row["score"])
    return groups


# One update is the algorithm box.


def by_hand(home: Path, **sections: Any) -> dict[str, Tensor]:
    """The loop without any of this file's practice: one pass, one update, with the package's own stages."""
    run = make_run(recipe_of(home, **sections))
    ground = lay_ground(run, lambda text: None)
    parts = assemble(ground)
    try:
        for number in range(run.optim.steps):
            asked = requests(ground, parts.cursor.next(run.rollout.prompts_per_step), number)
            found = sample_and_verify(ground, parts.engine, asked, run.rollout.num_generations, parts.sampling)
            batch = make_batch(*found, [None] * len(found[0]), number)
            logp = parts.scorer.sampled(ground.method.scores, batch)
            credit, weight, _ = batch_credit(ground.method, batch.tokens, logp, reduction=run.loss.reduction,
                                             length=run.loss.length, sampler_cap=None)
            for micro in parts.scorer.split(batch):
                rows = micro.tokens
                chunked_loss(ground.method.loss, parts.scorer.hidden(batch, micro), parts.scorer.heads(),
                             batch.tokens.tokens[rows], {name: value[rows] for name, value in credit.items()},
                             weight[rows]).loss.backward()
            parts.optimizer.step(number)
            parts.optimizer.zero_grad()
            parts.engine.sync(parts.backbone.model.named_parameters(), number + 1)
    finally:
        assert ground.rewarder is not None
        ground.rewarder.close()
    return {name: p.detach().clone() for name, p in parts.backbone.model.named_parameters()}


@pytest.mark.parametrize("method", ["grpo", "gspo"])
def test_with_one_update_a_run_is_the_plain_loop_bit_for_bit(home: Path, method: str) -> None:
    sections: dict[str, Any] = {"method": {"name": method}, "optim": {"token_budget": 200}}
    run = trained(home, f"plain-{method}", **sections)
    plain = by_hand(home, data={"heldout": 0}, reward=scored_by(home, "varied"), **sections)
    assert largest_gap(weights(run), plain) == 0.0
    assert not {"updates", "approx_kl", "clip_ratio", "filter/drawn"} & metrics(run)[0].keys()
    assert "used" not in rollouts_of(run, 1)[0]


# Dead groups are drawn anew.


def test_dead_groups_are_replaced_by_live_ones_and_every_rollout_drawn_is_kept_with_a_mark(home: Path) -> None:
    run = trained(home, "filtered", "only_level_2", rollout={"filter_groups": True, "max_resample": 7})
    assert len(metrics(run)) == STEPS
    for row in metrics(run):
        rows = rollouts_of(run, row["step"])
        groups = scores_by_problem(rows)
        assert all(len(scores) == 4 for scores in groups.values())
        live = [problem for problem, scores in groups.items() if max(scores) - min(scores) > 1e-9]
        used = list(dict.fromkeys(r["problem"] for r in rows if r["used"]))
        assert used == live[:2] and len(used) == 2
        assert row["filter/drawn"] == len(groups) == 2 * (1 + row["filter/rounds"])
        assert row["filter/kept"] == 2 and row["filter/surplus"] == len(live) - 2
        assert row["frac_reward_zero_std"] == pytest.approx(1 - len(live) / len(groups))
        assert row["completions/tokens"] == sum(r["tokens"] for r in rows)
        assert row["grad_norm"] > 0 and "health/dead_groups" not in row
    assert sum(row["filter/rounds"] for row in metrics(run)) > 0


def test_the_budget_of_rounds_ends_the_drawing_and_the_step_goes_on_with_what_is_live(home: Path) -> None:
    run = trained(home, "budget", "only_level_2", optim={"steps": 6},
                  rollout={"filter_groups": True, "max_resample": 1})  # fmt: skip
    rows = metrics(run)
    assert {row["filter/rounds"] for row in rows} <= {0.0, 1.0}
    short = [row for row in rows if row["filter/kept"] == 1]
    assert short, "some step of this seed finds one live group alone"
    for row in short:
        assert sum(r["used"] for r in rollouts_of(run, row["step"])) == 4 and row["grad_norm"] > 0


def test_a_step_without_a_live_group_trains_on_its_first_draw_and_says_so(home: Path) -> None:
    run = trained(home, "none", "nobody", rollout={"filter_groups": True, "max_resample": 2}, optim={"steps": 1})
    (row,) = metrics(run)
    assert (row["filter/drawn"], row["filter/kept"], row["filter/rounds"]) == (6, 0, 2)
    assert row["health/dead_groups"] == 1.0 and row["grad_norm"] == 0.0
    assert [r["used"] for r in rollouts_of(run, 1)] == [True] * 8 + [False] * 16
    assert largest_gap(weights(run), start(home)) == 0.0


def test_drawing_anew_stops_where_every_problem_was_drawn(home: Path) -> None:
    run = trained(home, "all", "nobody", data={"heldout": 0, "train": 5}, optim={"steps": 2},
                  rollout={"filter_groups": True, "max_resample": 50})  # fmt: skip
    for row in metrics(run):
        assert row["filter/drawn"] == 5 == len({r["problem"] for r in rollouts_of(run, row["step"])})
        assert row["filter/rounds"] == 2


@pytest.mark.parametrize(("by", "rounds", "kept"), [(True, 0, 2), ("right", 2, 0)])
def test_right_rollouts_of_other_lengths_are_a_live_group_by_score_and_a_dead_one_by_right(
    home: Path, by: Any, rounds: int, kept: int
) -> None:
    run = trained(home, f"by-{by}", "all_right+rank", optim={"steps": 1},
                  rollout={"filter_groups": by, "max_resample": 2})  # fmt: skip
    (row,) = metrics(run)
    assert (row["filter/rounds"], row["filter/kept"]) == (rounds, kept)
    assert row["reward/status/right"] == 1.0 and row["reward_std"] > 0


def test_by_right_a_group_is_live_where_some_are_right_and_some_are_not() -> None:
    def group(name: str, *verdicts: Verdict) -> list[tuple[Rollout, Verdict]]:
        made = [Rollout(Problem(name, "?"), i, Prompt((1,)), (2,), (0.0,), "", "stop", Sampling(), 0, 0)
                for i in range(len(verdicts))]
        return list(zip(made, verdicts, strict=True))

    right, wrong, unheard = Verdict(1.0, "right"), Verdict(0.0, "wrong"), Verdict(None, "unparsed")
    pairs = [*group("both", right, wrong), *group("penalties", right, Verdict(0.4, "right")),
             *group("shades", wrong, Verdict(0.3, "wrong")), *group("level", right, Verdict(1.0, "wrong")),
             *group("no opinion", right, unheard), *group("cut off", right, Verdict(0.0, "timeout"))]
    rollouts, verdicts = [r for r, _ in pairs], [v for _, v in pairs]
    assert live_groups(rollouts, verdicts) == ["both", "penalties", "shades", "cut off"]
    assert live_groups(rollouts, verdicts, by="right") == ["both", "level", "cut off"]


def test_where_every_group_is_live_filtering_changes_nothing(home: Path) -> None:
    plain = trained(home, "unfiltered", "rank")
    filtered = trained(home, "needless", "rank", rollout={"filter_groups": True})
    assert all(row["filter/rounds"] == 0 and row["filter/surplus"] == 0 for row in metrics(filtered))
    assert largest_gap(weights(plain), weights(filtered)) == 0.0


def test_a_rollout_drawn_anew_is_the_one_that_its_key_names(home: Path) -> None:
    """(seed, step, problem, sample) alone: the same problem, drawn first by another step order, is sampled alike."""
    run = trained(home, "keyed", "only_level_2", rollout={"filter_groups": True, "max_resample": 7}, optim={"steps": 1})
    rows = rollouts_of(run, 1)
    assert len(scores_by_problem(rows)) > 2
    wide = trained(home, "keyed-wide", "only_level_2", optim={"steps": 1},
                   rollout={"prompts_per_step": len(scores_by_problem(rows))})  # fmt: skip
    assert [r["response"] for r in rollouts_of(wide, 1)] == [r["response"] for r in rows]


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 2, 2, 1), (4, 3)])
def test_no_step_draws_a_problem_twice_whatever_its_rounds_and_epochs(sizes: tuple[int, ...]) -> None:
    problems = [Problem(str(i), str(i)) for i in range(10)]
    cursor, counts = Cursor(problems, seed=1), dict.fromkeys(map(str, range(10)), 0)
    for step in range(40):
        drawn: list[str] = []
        for size in sizes[: 1 + step % len(sizes)]:
            drawn += [problem.id for problem in cursor.next(size, drawn)]
        assert len(set(drawn)) == len(drawn)
        for name in drawn:
            counts[name] += 1
    assert max(counts.values()) - min(counts.values()) <= 1  # and each comes once per epoch
    with pytest.raises(UserError, match="11 problems a step"):
        cursor.next(2, [str(i) for i in range(9)])


# Truncated rollouts are masked.


def test_masked_truncated_rollouts_keep_their_score_in_the_statistics_but_have_no_token_in_the_loss() -> None:
    def made(index: int, finish: str, size: int) -> Rollout:
        return Rollout(Problem("a", "?"), index, Prompt((1,)), (5,) * size, (0.0,) * size, "", finish,  # type: ignore[arg-type]
                       Sampling(), 0, 0)  # fmt: skip

    rollouts = [made(0, "stop", 2), made(1, "length", 3), made(2, "stop", 1)]
    verdicts = [Verdict(1.0), Verdict(0.0), Verdict(0.5)]
    for masked, mask in ((False, [True] * 6), (True, [True, True, False, False, False, True])):
        batch = make_batch(rollouts, verdicts, [None] * 3, 0, mask_truncated=masked)
        assert batch.tokens.mask is not None and batch.tokens.mask.tolist() == mask
        method = make_run({"model": "x", "data": "x", "method": {"name": "dr_grpo"}, "reward": "exact"}).method.build()
        credit, weight, _ = batch_credit(method, batch.tokens, {}, reduction="token_mean", length=None,
                                         sampler_cap=None)
        assert credit["advantage"].tolist() == [0.5, 0.5, -0.5, -0.5, -0.5, 0.0]  # the mean of all three is 0.5
        assert weight.tolist() == pytest.approx([1 / sum(mask) if counted else 0.0 for counted in mask])


def test_a_batch_of_truncated_rollouts_alone_moves_nothing_and_is_named(home: Path) -> None:
    for name in ("grpo", "gspo"):
        run = trained(home, f"cut-{name}", "varied", method={"name": name}, optim={"steps": 1, "updates_per_batch": 2},
                      rollout={"max_completion_length": 2, "stop": [], "mask_truncated": True})  # fmt: skip
        (row,) = metrics(run)
        assert row["completions/clipped_ratio"] == 1.0 and row["counted"] == 0.0 and row["loss"] == 0.0
        assert row["grad_norm"] == 0.0 and row["health/cut_off"] == 1.0
        assert largest_gap(weights(run), start(home)) == 0.0


# The trainer beside dense float64.


class Watched:
    """The rollouts, verdicts and batch of each step of a run, as `train.step` made them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Sequence[Rollout], Sequence[Verdict], Batch]] = []
        loop = importlib.import_module("selftaught.train")
        original = loop.make_batch

        def watched(rollouts: Any, verdicts: Any, *args: Any, **keywords: Any) -> Batch:
            batch = original(rollouts, verdicts, *args, **keywords)
            self.made.append((rollouts, verdicts, batch))
            return batch

        monkeypatch.setattr(loop, "make_batch", watched)


def double(home: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float64).eval()


def dense_logp(model: Any, rollout: Rollout) -> Tensor:
    """Log-probs of the response, one forward pass per rollout, no packing and no cache."""
    prompt, response = list(rollout.prompt.token_ids), list(rollout.token_ids)
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1: -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


def advantages(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], scaled: bool) -> list[float]:
    groups: dict[str, list[float]] = {}
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        assert verdict.score is not None
        groups.setdefault(rollout.problem.id, []).append(verdict.score)
    found = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        scores = torch.tensor(groups[rollout.problem.id], dtype=torch.float64)
        spread = float(scores.std()) + 1e-6 if scaled else 1.0
        assert verdict.score is not None
        found.append((verdict.score - float(scores.mean())) / spread)
    return found


def share(reduction: str, counted: Sequence[int], index: int, length: int) -> float:
    """The weight of a token of rollout `index`; counted: tokens in the loss per rollout."""
    if reduction == "token_mean":
        return 1 / sum(counted)
    if reduction == "sequence_mean":
        return 1 / (counted[index] * sum(size > 0 for size in counted))
    return 1 / (len(counted) * length)


def dense(model: Any, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], *, reduction: str, scaled: bool,
          length: int = 7, masked: bool = False, cap: float | None = None, old: Sequence[Tensor] | None = None,
          clip: tuple[float, float] = (0.2, 0.2)) -> Tensor:  # fmt: skip
    """GRPO's loss by hand."""
    counted = [0 if masked and r.finish == "length" else len(r.token_ids) for r in rollouts]
    total = torch.zeros((), dtype=torch.float64)
    for index, (rollout, advantage) in enumerate(zip(rollouts, advantages(rollouts, verdicts, scaled), strict=True)):
        if not counted[index]:
            continue
        logp = dense_logp(model, rollout)
        before = logp.detach() if old is None else old[index]
        rho = (logp - before).exp()
        loss = -torch.minimum(rho * advantage, rho.clamp(1 - clip[0], 1 + clip[1]) * advantage)
        if cap is not None:
            loss = loss * (before - torch.tensor(rollout.logp_sampler, dtype=torch.float64)).exp().clamp(max=cap)
        total = total + share(reduction, counted, index, length) * loss.sum()
    return total


def norm_of(loss: Tensor, model: Any) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters()))))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "untruncated"])
@pytest.mark.parametrize("method", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_every_reduction_and_scaling_of_a_step_equals_dense_float64(home: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    reduction: str, method: str, masked: bool) -> None:
    watched = Watched(monkeypatch)
    run = trained(home, f"dense-{reduction}-{method}-{masked}", "varied", method={"name": method},
                  loss={"reduction": reduction, "length": 7 if reduction == "constant" else None},
                  optim={"steps": 1, "token_budget": 150}, rollout={"mask_truncated": masked})  # fmt: skip
    ((rollouts, verdicts, _),) = watched.made
    assert any(r.finish == "length" for r in rollouts) and any(r.finish == "stop" for r in rollouts)
    model = double(home)
    loss = dense(model, rollouts, verdicts, reduction=reduction, scaled=method == "grpo", masked=masked)
    assert metrics(run)[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics(run)[0]["grad_norm"] == pytest.approx(norm_of(loss, model), rel=1e-4)


# The sampler is corrected for.


def perturbed(monkeypatch: pytest.MonkeyPatch, scale: float = 1.0) -> None:
    """A sampler whose log-probs are off by a different amount at every token."""
    original = TransformersEngine.poll

    def poll(self: TransformersEngine) -> list[Rollout]:
        return [replace(r, logp_sampler=tuple(p + scale * math.sin(3 * i + t) for i, (p, t) in
                                              enumerate(zip(r.logp_sampler, r.token_ids, strict=True))))
                for r in original(self)]  # fmt: skip

    monkeypatch.setattr(TransformersEngine, "poll", poll)


@pytest.mark.parametrize("updates", [1, 2])
def test_token_losses_are_multiplied_by_the_capped_ratio_to_the_sampler(home: Path, monkeypatch: pytest.MonkeyPatch,
                                                                        updates: int) -> None:
    perturbed(monkeypatch)
    watched = Watched(monkeypatch)
    run = trained(home, f"tis-{updates}", "varied", loss={"sampler_cap": 1.5}, rollout={"max_logp_gap": 2.0},
                  optim={"steps": 1, "minibatches": updates})  # fmt: skip
    ((rollouts, verdicts, _),) = watched.made
    (row,) = metrics(run)
    model = double(home)
    old = [dense_logp(model, rollout).detach() for rollout in rollouts]
    gap = [before - torch.tensor(r.logp_sampler, dtype=torch.float64) for before, r in zip(old, rollouts, strict=True)]
    flat = torch.cat(gap)
    assert 0.05 < float((flat > math.log(1.5)).double().mean()) < 0.95
    if updates == 1:
        loss = dense(model, rollouts, verdicts, reduction="token_mean", scaled=True, cap=1.5)
        plain = dense(model, rollouts, verdicts, reduction="token_mean", scaled=True)
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-6) and abs(loss.item() - plain.item()) > 1e-3
        assert row["grad_norm"] == pytest.approx(norm_of(loss, model), rel=1e-4)
    parts = [flat] if updates == 1 else [torch.cat(gap[:4]), torch.cat(gap[4:])]
    assert row["sampler/gap_mean"] == pytest.approx(sum(float(g.mean()) for g in parts) / updates, abs=1e-5)
    over = sum(float((g > math.log(1.5)).double().mean()) for g in parts) / updates
    assert row["sampler/ratio_capped"] == pytest.approx(over, abs=1e-6)


@pytest.mark.parametrize("optim", [{}, {"updates_per_batch": 2, "minibatches": 2}], ids=["one", "several"])
def test_a_gap_above_the_bound_refuses_before_any_update(home: Path, monkeypatch: pytest.MonkeyPatch,
                                                         optim: dict[str, Any]) -> None:
    perturbed(monkeypatch)
    stepped: list[int] = []
    original = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, step: (stepped.append(step), original(self, step))[1])
    with pytest.raises(UserError, match=r"max_logp_gap = 0\.1"):
        trained(home, f"gap-{len(optim)}", "varied", loss={"sampler_cap": 1.5}, optim=optim)
    assert stepped == []


# Several updates.


def test_several_updates_follow_the_clipped_ratio_by_hand(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    optim = {"steps": 1, "learning_rate": 2e-3, "updates_per_batch": 3, "minibatches": 2, "max_grad_norm": None,
             "eps": 1e-3}  # fmt: skip
    clip = {"eps_low": 0.02, "eps_high": 0.03}
    run = trained(home, "several", "varied", method={"name": "grpo", **clip}, optim=optim)
    ((rollouts, verdicts, _),) = watched.made
    model = double(home)
    old = [dense_logp(model, rollout).detach() for rollout in rollouts]
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-3, weight_decay=0.0)
    losses, kls, clipped, norms = [], [], [], []
    for update in range(6):
        part = slice(0, 4) if update % 2 == 0 else slice(4, 8)  # the groups, in the order drawn
        mine, said, before = rollouts[part], verdicts[part], old[part]
        loss = dense(model, mine, said, reduction="token_mean", scaled=True, old=before, clip=(0.02, 0.03))
        log_ratio = [dense_logp(model, r).detach() - b for r, b in zip(mine, before, strict=True)]
        advantage = torch.cat([torch.full((len(b),), a, dtype=torch.float64) for a, b in
                               zip(advantages(mine, said, True), before, strict=True)])  # fmt: skip
        rho = torch.cat(log_ratio).exp()
        kls.append(float((rho - 1 - rho.log()).mean()))
        clipped.append(float((((advantage > 0) & (rho > 1.03)) | ((advantage < 0) & (rho < 0.98))).double().mean()))
        adam.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
        adam.step()
    (row,) = metrics(run)
    assert row["updates"] == 6
    for name, values in (("loss", losses), ("approx_kl", kls), ("grad_norm", norms), ("clip_ratio", clipped)):
        assert row[name] == pytest.approx(sum(values) / 6, rel=1e-3, abs=1e-5), name
    assert row["clip_ratio"] > 0.05 and row["approx_kl"] > 0
    final = {name: p.detach().float() for name, p in model.named_parameters()}
    assert largest_gap(weights(run), final) < 1e-5 < 1e-3 < largest_gap(weights(run), start(home))


def test_every_update_of_a_step_has_its_learning_rate_and_teachers_follow_once(home: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[int] = []
    original = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, step: (stepped.append(step), original(self, step))[1])
    run = trained(home, "schedule", method={"name": "rlsd", "teacher": {"weights": "snapshot", "every": 2}},
                  optim={"steps": 4, "updates_per_batch": 2, "minibatches": 2, "schedule": "linear"})  # fmt: skip
    assert stepped == [step for step in range(4) for _ in range(4)]
    assert [row["learning_rate"] for row in metrics(run)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    distances = [row["teacher/snapshot/distance"] for row in metrics(run)]
    assert distances[0] > 0 and distances[2] > 0 and distances[1] == distances[3] == 0
    assert all(row["skipped"] == 0 for row in metrics(run))


@pytest.mark.parametrize("method", ["gspo", "cispo", "sdpo", "dopd", "sdpg"])
def test_other_methods_take_several_updates(home: Path, method: str) -> None:
    teacher = {"teacher": {"weights": "initial"}} if method == "dopd" else {}
    run = trained(home, f"methods-{method}", "varied", method={"name": method, **teacher},
                  optim={"updates_per_batch": 2})  # fmt: skip
    for row in metrics(run):
        assert row["grad_norm"] > 0 and row["approx_kl"] > 0 and math.isfinite(row["loss"])
    if method == "gspo":
        assert max(row["clip_ratio"] for row in metrics(run)) > 0
        ratios = [row["method/ratio"] for row in metrics(run)]
        assert any(abs(ratio - 1) > 1e-4 for ratio in ratios)  # scored anew, not that of the first update


def test_scores_of_views_are_of_before_the_first_update_and_the_students_own_are_not(home: Path) -> None:
    from selftaught.batches import optimiser_batches

    run = make_run(recipe_of(home, data={"heldout": 0}, method={"name": "gspo"},
                             optim={"updates_per_batch": 2, "minibatches": 2}))  # fmt: skip
    ground = lay_ground(run, lambda text: None)
    parts: Parts = assemble(ground)
    assert ground.rewarder is not None
    ground.rewarder.close()
    asked = requests(ground, parts.cursor.next(2), 0)
    rollouts = parts.engine.sample(asked, 4, parts.sampling)
    batch = make_batch(rollouts, [Verdict(float(i)) for i in range(8)], [None] * 8, 0)
    seen = []
    for part, logp in optimiser_batches(parts, batch):
        assert part.tokens.logp_old is not None
        seen.append((part, logp["student"] - part.tokens.logp_old))
        with torch.no_grad():
            for parameter in parts.backbone.model.parameters():
                parameter.mul_(1.01)
    assert len(seen) == 4 and seen[0][1].abs().max() == 0
    assert all(gap.abs().max() > 1e-4 for _, gap in seen[1:])
    whole = torch.cat([seen[0][0].tokens.tokens, seen[1][0].tokens.tokens])
    assert whole.equal(batch.tokens.tokens) and seen[2][0].tokens.tokens.equal(seen[0][0].tokens.tokens)


@pytest.mark.parametrize(("name", "updates", "passes"), [
    # Scores for credit, and the student's pass of each update: no view is run again for a loss that does not read it.
    ("opd", 1, {"student": 2, "teacher": 1}), ("opd", 3, {"student": 4, "teacher": 1}),
    ("rlsd", 1, {"student": 2, "teacher": 1}), ("rlsd", 3, {"student": 4, "teacher": 1}),
    ("gspo", 3, {"student": 6}),  # whose credit reads the student's ratios anew before each later update
    ("opsd", 1, {"student": 1, "teacher": 1}),  # a loss that reads it
])  # fmt: skip
def test_nothing_is_scored_twice_in_a_step(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, updates: int,
                                           passes: dict[str, int]) -> None:
    from selftaught.assemble import privileges_of
    from selftaught.batches import optimiser_batches

    other = {"teacher": str(save_tiny(home / "other", seed=1))} if name == "opd" else {}
    run = make_run(recipe_of(home, data={"heldout": 0}, eval={"best": None}, method={"name": name}, **other,
                             optim={"updates_per_batch": updates}))  # fmt: skip
    ground = lay_ground(run, lambda text: None)
    parts: Parts = assemble(ground)
    assert ground.rewarder is not None
    ground.rewarder.close()
    rollouts = parts.engine.sample(requests(ground, parts.cursor.next(2), 0), 4, parts.sampling)
    verdicts = [Verdict(float(i % 2)) for i in range(8)]
    batch = make_batch(rollouts, verdicts, privileges_of(ground, rollouts, verdicts, 0), 0)
    runs: dict[str, int] = {}
    original = Scorer._run

    def counted(self: Scorer, batch: Batch, micro: Any, view: str, *rest: Any) -> Tensor:
        runs[view] = runs.get(view, 0) + 1
        return original(self, batch, micro, view, *rest)

    monkeypatch.setattr(Scorer, "_run", counted)
    session: Any = SimpleNamespace(parts=parts, done=0, clock=lambda stage, since: 0.0)
    train = importlib.import_module("selftaught.train")
    norms = [train.update(session, part, logp)["grad_norm"] for part, logp in optimiser_batches(parts, batch)]
    assert len(norms) == updates and norms[0] > 0
    assert runs == passes


def made_batch(sizes: Sequence[int], groups: Sequence[str]) -> Batch:
    rollouts = [Rollout(Problem(name, "?"), i, Prompt((1, i)), tuple(range(10 * i, 10 * i + size)), (0.5 * i,) * size,
                        "", "stop", Sampling(), 0, 0) for i, (size, name) in enumerate(zip(sizes, groups, strict=True))]
    return make_batch(rollouts, [Verdict(float(i)) for i in range(len(sizes))], [None] * len(sizes), 3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_a_batch_is_cut_into_whole_groups_wherever_their_rollouts_lie(count: int) -> None:
    batch = made_batch([1, 3, 2, 4, 1, 2, 5], list("abacbdc"))
    parts = list(cut(batch, count))
    assert len(parts) == min(count, 4)
    assert torch.stack([rows for _, rows in parts]).sum(0).eq(1).all()
    groups = [set(part.tokens.group.tolist()) for part, _ in parts]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 4
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for part, rows in parts:
        assert part.tokens.tokens.tolist() == [token for response in part.responses for token in response]
        assert part.tokens.tokens.equal(batch.tokens.tokens[rows]) and part.tokens.step == 3
        ids = part.tokens.sequence_ids
        assert ids.unique().tolist() == list(range(len(part.responses)))
        kept = [int(prompt[1]) for prompt in part.contexts["plain"]]
        assert part.tokens.reward.tolist() == list(map(float, kept))
        assert part.tokens.logp_sampler.equal(part.tokens.reward[ids] * 0.5)
        assert [batch.responses[i] for i in kept] == list(part.responses)


def test_picking_every_rollout_is_the_batch() -> None:
    batch = made_batch([1, 3, 2], list("aab"))
    same, rows = pick(batch, [0, 1, 2])
    assert rows.all() and same.responses == batch.responses and same.contexts == batch.contexts
    assert same.tokens.sequence_ids.equal(batch.tokens.sequence_ids)


def test_clip_ratio_marks_what_the_clip_leaves_without_a_gradient() -> None:
    from selftaught.loss import clipped

    rho = torch.tensor([0.5, 0.9, 1.0, 1.25, 1.4, 3.5] * 3, dtype=torch.float64)
    advantage = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).repeat_interleave(6)
    for settings in ({"eps_low": 0.2, "eps_high": 0.28}, {"eps_low": None, "eps_high": 0.28},
                     {"eps_low": 0.2, "eps_high": None, "dual_clip": 3.0}, {"eps_low": None, "eps_high": None}):
        x = rho.clone().requires_grad_()
        clipped(x, advantage, **settings).sum().backward()
        silent = (x.grad == 0) & (advantage != 0)
        assert clip_ratio(rho, advantage, **settings)["clip_ratio"].bool().equal(silent), settings


# Resume is exact.


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Told to stop in the middle of a step, this process's run saves after it."""
    original = Session.record

    def stop(done: int) -> None:
        def record(self: Session, found: Any) -> None:
            original(self, found)
            if self.done == done:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Session, "record", record)

    yield stop
    monkeypatch.setattr(Session, "record", original)


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_with_filtering_and_several_updates_resumes_exactly(home: Path, at: int,
                                                                  stopped_after: Callable[[int], None]) -> None:
    sections: dict[str, Any] = {
        "rollout": {"filter_groups": True, "max_resample": 2, "mask_truncated": True},
        "optim": {"steps": 5, "updates_per_batch": 2, "minibatches": 2, "schedule": "cosine"},
        "method": {"name": "rlsd", "teacher": {"weights": "ema", "rate": 0.1}},
    }
    if not (home / "runs" / "whole" / "final").exists():
        trained(home, "whole", "only_level_2", **sections)
    whole = home / "runs" / "whole"
    stopped_after(at)
    run = trained(home, f"stopped-{at}", "only_level_2", **sections)
    assert run.interrupted == signal.SIGTERM
    stopped_after(-1)
    again = trained(home, f"stopped-{at}", "only_level_2", resume=True, **sections)
    final = load_file(whole / "final" / "model.safetensors")
    assert largest_gap(weights(again), final) == 0.0
    assert [without_clocks(row) for row in metrics(again)] == [
        without_clocks(row) for row in lines(whole / "metrics.jsonl")]  # fmt: skip
    for path in (whole / "rollouts").iterdir():
        assert (again.folder / "rollouts" / path.name).read_bytes() == path.read_bytes()
    rounds = [row["filter/rounds"] for row in metrics(again)]
    assert sum(rounds[:at]) > 0 and sum(rounds[at:]) > 0  # the cursor moved by more than prompts_per_step on both sides


# What cannot be is refused.


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=opsd", "rollout.filter_groups=true"], r"rollout\.filter_groups = true: method 'opsd' uses no reward"),
        (["method=opsd", "rollout.filter_groups=right"], r"rollout\.filter_groups = right: method 'opsd' uses no"),
        (["rollout.filter_groups=rigth"], r"rollout\.filter_groups = 'rigth': it should be False, True or 'right'"),
        (["method=sdpo", "rollout.filter_groups=true", "rollout.num_generations=1"], r"filter_groups=false"),
        (["optim.minibatches=3"], r"optim\.minibatches = 3: must divide rollout\.prompts_per_step = 8.*1, 2, 4, 8"),
        (["optim.minibatches=16"], r"optim\.minibatches = 16.*whole groups"),
        (["optim.updates_per_batch=0"], r"optim\.updates_per_batch = 0"),
        (["rollout.max_resample=0"], r"rollout\.max_resample = 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_run("quickstart", overrides)


def test_a_copy_of_the_cursor_is_unmoved_by_rounds_of_a_refused_step() -> None:
    cursor = Cursor([Problem(str(i), str(i)) for i in range(5)], seed=0)
    kept = copy.copy(cursor)
    before = kept.state()
    drawn = [p.id for p in cursor.next(3)]
    cursor.next(2, drawn)
    assert kept.state() == before


@pytest.mark.parametrize(
    ("name", "practice"),
    [
        ("grpo", {"reduction": "sequence_mean"}),
        ("dapo", {"reduction": "token_mean", "filter_groups": "right", "minibatches": 2}),
        ("dr_grpo", {"reduction": "constant", "length": 16}),
        ("gspo", {"reduction": "sequence_mean", "updates_per_batch": 2}),
        ("cispo", {"reduction": "token_mean", "updates_per_batch": 2}),
    ],
)
def test_small_recipes_are_the_quickstarts_task_with_each_methods_own_practice(name: str,
                                                                               practice: dict[str, Any]) -> None:
    run, quickstart = load_run(f"small/{name}"), load_run("quickstart")
    assert run.method.name == name and run.optim.steps == 30
    for section in ("model", "data", "eval", "seed"):
        assert getattr(run, section) == getattr(quickstart, section)
    found = {**run.loss.model_dump(), **run.rollout.model_dump(), **run.optim.model_dump()}
    assert {field: found[field] for field in practice} == practice
    plain = {"filter_groups": False, "minibatches": 1, "updates_per_batch": 1, "length": None} | practice
    assert {field: found[field] for field in plain} == plain
    assert (run.reward == quickstart.reward) is (name != "dapo")
