"""K demonstrations: mixture and average of K teachers, against closed forms and dense float64 sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import selftaught
from own import lines, make_home, recipe_of
from selftaught import kernels
from selftaught.errors import UserError
from selftaught.loss import chunked_loss
from selftaught.methods import Several, batch_credit, build
from selftaught.methods.base import Method
from selftaught.records import Batch, TokenBatch
from selftaught.run import make_run
from selftaught.score import Backbone, Scorer
from selftaught.vocabulary import Head, Mixture, TokenDist, sampled_log_probs
from tiny import tiny_llama

V, H, K = 7, 5, 3
COUNTS = (3, 1, 2, 0)  # privileges of each rollout
LENGTHS = (3, 2, 1, 4)
N = sum(LENGTHS)
METHODS = {
    "opsd": {"clip": None}, "opsd-clipped": {}, "sdft": {"skip": 1}, "sdpo": {"top_k": 3}, "demopsd": {"top_k": 3},
    "rlsd": {"lam_decay": None}, "sdpg": {"beta": 0.7, "beta_warmup": 0, "steps": 9, "beta_decay": 1},
    "dopd": {"top_k": None},
}  # fmt: skip


def method_of(name: str) -> Method:
    return build(name.partition("-")[0], **METHODS[name])


def batch_of(counts: tuple[int, ...] = COUNTS) -> TokenBatch:
    generator = torch.Generator().manual_seed(3)
    return TokenBatch(
        tokens=torch.randint(V, (N,), generator=generator),
        sequence_ids=torch.arange(4).repeat_interleave(torch.tensor(LENGTHS)),
        reward=torch.tensor([1.0, 0.0, 1.0, 0.5]), group=torch.tensor([0, 0, 1, 1]),
        logp_old=None, privileged=torch.tensor(counts) > 0, privileges=torch.tensor(counts), step=2,
    )  # fmt: skip


def states(method: Method, seed: int = 0, scale: float = 3.0) -> tuple[dict[str, Tensor], dict[str, Head]]:
    generator = torch.Generator().manual_seed(seed)
    hidden = {name: scale * torch.randn(N, H, dtype=torch.float64, generator=generator)
              for name in ("student", *method.views)}
    heads = {name: Head(torch.randn(V, H, dtype=torch.float64, generator=generator))
             for name in ("student", *method.views)}
    return hidden, heads


def chunked(method: Method, batch: TokenBatch, hidden: dict[str, Tensor], heads: dict[str, Head],
            chunk: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the student's hidden states, of its head) by the path that training takes."""
    student = hidden["student"].clone().requires_grad_()
    weight = heads["student"].weight.clone().requires_grad_()
    held = {**heads, "student": Head(weight)}
    logp = {name: sampled_log_probs(hidden[name], heads[name], batch.tokens)[0] for name in hidden}
    credit, weights, _ = batch_credit(method, batch, logp, reduction="token_mean", length=None, sampler_cap=None,
                                      dtype=torch.float64)
    out = chunked_loss(method.loss, {**hidden, "student": student}, held, batch.tokens, credit, weights, chunk=chunk)
    out.loss.backward()
    assert student.grad is not None and weight.grad is not None
    return out.loss.detach(), student.grad, weight.grad


def dense(method: Method, batch: TokenBatch, combine: str, hidden: dict[str, Tensor],
          heads: dict[str, Head]) -> tuple[Tensor, Tensor, Tensor]:
    """The same written out: per k one plain run of the method on the rollouts that have it, over whole tensors."""
    student = hidden["student"].clone().requires_grad_()
    weight = heads["student"].weight.clone().requires_grad_()
    logits = {name: hidden[name] @ heads[name].weight.t() for name in hidden}
    own = TokenDist(student @ weight.t(), batch.tokens)
    seen = {name for name, view in method.views.items() if view.context == "privileged"}
    assert batch.privileges is not None
    counts_N = batch.privileges[batch.sequence_ids]

    def table(name: str, k: int) -> Tensor:
        return logits[f"{name}.{k}" if k and name in seen else name]

    def terms(tables: dict[str, Tensor], there: Tensor) -> tuple[Tensor, Tensor]:
        dists = {name: TokenDist(table, batch.tokens) for name, table in tables.items()}
        logp = {name: dist.at_sampled for name, dist in dists.items()} | {"student": own.at_sampled.detach()}
        credit = method.credit(replace(batch, privileged=there), logp)
        return method.loss(own, dists, credit).loss, credit["counted"]

    any_B = batch.privileges > 0
    if combine == "mixture":
        heat, mixed = getattr(method, "temperature", 1.0), {}  # logits whose probabilities at `heat` are the mean
        for name in method.views:
            probs = [(table(name, k) / heat).softmax(-1) for k in range(K)]
            mixed[name] = heat * torch.stack([
                torch.stack([probs[k][n] for k in range(max(1, int(counts_N[n])))]).mean(0) for n in range(N)
            ]).log()  # fmt: skip
        loss, counted = terms(mixed, any_B)
        total = loss
    else:
        total, counted = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.bool)
        for k in range(K):
            part, counts = terms({name: table(name, k) for name in method.views}, batch.privileges > k)
            there = counts_N > k if k else torch.ones(N, dtype=torch.bool)
            counted = counted | counts
            total = total + torch.where(there, part / counts_N.clamp(min=1), 0.0)
    loss = torch.where(counted, total, 0.0).sum() / counted.sum()
    loss.backward()
    assert student.grad is not None and weight.grad is not None
    return loss.detach(), student.grad, weight.grad


@pytest.mark.parametrize("combine", ["average", "mixture"])
@pytest.mark.parametrize("name", METHODS)
def test_the_chunked_path_is_the_dense_sum_in_loss_and_gradients(name: str, combine: str):
    method = method_of(name)
    several = Several(method, K, combine)  # type: ignore[arg-type]
    hidden, heads = states(several)
    expected = dense(method, batch_of(), combine, hidden, heads)
    for chunk in (1, 4, N):
        for mine, theirs in zip(chunked(several, batch_of(), hidden, heads, chunk), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert expected[1].abs().max() > 1e-4


@pytest.mark.parametrize("combine", ["average", "mixture"])
@pytest.mark.parametrize("name", METHODS)
def test_identical_teachers_are_one_teacher(name: str, combine: str):
    method = method_of(name)
    several = Several(method, K, combine)  # type: ignore[arg-type]
    hidden, heads = states(several)
    for view in several.views:
        hidden[view], heads[view] = hidden[view.partition(".")[0]], heads[view.partition(".")[0]]
    # Equal counts: DOPD's means over the batch would otherwise be over other tokens for each k.
    batch = batch_of((3, 3, 3, 3))
    alone = chunked(method, batch, {n: hidden[n] for n in ("student", *method.views)}, heads)
    for mine, theirs in zip(chunked(several, batch, hidden, heads), alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combine", ["average", "mixture"])
@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_demonstrations_changes_nothing(name: str, combine: str):
    method = method_of(name)
    several = Several(method, K, combine)  # type: ignore[arg-type]
    hidden, heads = states(several)
    batch = batch_of((3, 3, 3, 0))
    turned = dict(hidden)
    for view in several.views:
        base, _, k = view.partition(".")
        if f"{base}.1" in several.views:  # the next one; the last rollout has none and keeps the student's prompt
            k_next = (int(k or 0) + 1) % K
            source = f"{base}.{k_next}" if k_next else base
            turned[view] = torch.cat([hidden[source][: -LENGTHS[-1]], hidden[view][-LENGTHS[-1] :]])
            heads[view] = heads[base]
    for mine, theirs in zip(chunked(several, batch, turned, heads), chunked(several, batch, hidden, heads),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_mean_over_teachers_is_of_quantities_and_leaves_labels_out() -> None:
    several = Several(method_of("dopd"), K, "average")
    hidden, heads = states(several)
    logp = {name: sampled_log_probs(hidden[name], heads[name], batch_of().tokens)[0] for name in hidden}
    credit = several.credit(batch_of(), logp)
    assert "route" not in credit  # each teacher's own stays, by its number
    assert all(credit[f"{k}.route"].dtype == torch.int64 for k in range(K))


def test_what_a_rollout_does_not_have_is_not_read():
    for name, combine in ((name, combine) for name in METHODS for combine in ("average", "mixture")):
        several = Several(method_of(name), K, combine)  # type: ignore[arg-type]
        hidden, heads = states(several)
        counts_N = torch.tensor(COUNTS)[batch_of().sequence_ids]
        other = dict(hidden)
        for view in several.views:
            absent = counts_N <= int(view.partition(".")[2] or 0)
            if "." in view:
                other[view] = torch.where(absent[:, None], torch.full_like(hidden[view], 50.0), hidden[view])
        for mine, theirs in zip(chunked(several, batch_of(), other, heads), chunked(several, batch_of(), hidden, heads),
                                strict=True):
            assert torch.equal(mine, theirs), (name, combine)


# What the two can and cannot move (arXiv 2606.26091).


def optimum(loss, start: Tensor) -> Tensor:
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("divergence", ["kl_teacher_student", "kl_student_teacher"])
def test_forward_kl_has_the_mixture_for_its_optimum_either_way_and_reverse_kl_only_by_the_mixture(divergence: str):
    teachers = torch.randn(K, 1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.5
    probs = teachers.softmax(-1)
    arithmetic = probs.mean(0)
    geometric = probs.log().mean(0).softmax(-1)
    tokens, has = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    views = {("teacher" if k == 0 else f"teacher.{k}"): TokenDist(teachers[k], tokens) for k in range(K)}
    method = build("sdpo", divergence=divergence, top_k=None)
    credit = {"counted": has, **{f"has.{k}": has for k in range(K)}, **{f"{k}.counted": has for k in range(K)}}
    found = {
        combine: optimum(
            lambda logits, c=combine: Several(method, K, c).loss(TokenDist(logits, tokens), views, credit).loss.sum(),
            torch.zeros(1, V, dtype=torch.float64),
        )
        for combine in ("average", "mixture")
    }
    torch.testing.assert_close(found["mixture"], arithmetic, rtol=1e-5, atol=1e-6)
    expected = arithmetic if divergence == "kl_teacher_student" else geometric
    torch.testing.assert_close(found["average"], expected, rtol=1e-5, atol=1e-6)
    assert (arithmetic - geometric).abs().max() > 0.01


def test_a_mixture_is_the_mean_of_probabilities_at_every_temperature_and_on_every_part_of_it():
    logits = 30 * torch.randn(K, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits[0, 0, 0] = -torch.inf
    has = torch.tensor(COUNTS).clamp(min=1)[batch_of().sequence_ids][:, None] > torch.arange(K)
    tokens = batch_of().tokens
    mixture = Mixture([TokenDist(table, tokens) for table in logits], has)
    for temperature in (1.0, 1.7):
        probs = (logits / temperature).softmax(-1) * has.t()[..., None]
        expected = probs.sum(0) / has.sum(1)[:, None]
        tempered = mixture.at(temperature)
        torch.testing.assert_close(tempered.log_probs.exp(), expected, rtol=1e-12, atol=1e-300)
        torch.testing.assert_close(tempered.at_sampled.exp(), expected[torch.arange(N), tokens], rtol=1e-12, atol=0)
        torch.testing.assert_close(tempered.entropy(), -torch.special.xlogy(expected, expected).sum(-1), rtol=1e-9,
                                   atol=1e-12)
        rows = has[:, 1]
        assert torch.equal(tempered[rows].log_probs, tempered.log_probs[rows])


# Through the scorer.


def test_every_split_gives_the_same_gradient_and_absent_prompts_are_not_run():
    model = tiny_llama(64)
    backbone = Backbone(model, "shared")
    generator = torch.Generator().manual_seed(5)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 64, (n,), generator=generator).tolist())

    prompts = [ids(6)] * 2 + [ids(7)] * 2
    own = [(ids(9), ids(8), ids(10)), (ids(9),), (ids(8), ids(11)), ()]
    responses = tuple(ids(n) for n in LENGTHS)
    tokens = replace(batch_of(), tokens=torch.tensor([t for row in responses for t in row]))
    contexts = {"plain": tuple(prompts),
                "privileged": tuple(o[0] if o else p for o, p in zip(own, prompts, strict=True)),
                **{f"privileged.{k}": tuple(o[k] if len(o) > k else () for o in own) for k in (1, 2)}}
    batch = Batch(tokens, contexts, responses)
    several = Several(build("opsd", clip=None, teacher={"weights": "live"}), K, "mixture")

    def step(budget: int, chunk: int, several: Several = several) -> tuple[Tensor, Tensor, int]:
        model.zero_grad()
        scorer = Scorer(backbone, several.views, lambda name: None, budget)
        logp = scorer.sampled(several.scores, batch)
        credit, weight, _ = batch_credit(several, tokens, logp, reduction="token_mean", length=None, sampler_cap=None)
        total, cuts = torch.zeros(()), 0
        for micro in scorer.split(batch):
            out = chunked_loss(several.loss, scorer.hidden(batch, micro), scorer.heads(), tokens.tokens[micro.tokens],
                               {n: v[micro.tokens] for n, v in credit.items()}, weight[micro.tokens], chunk=chunk)
            out.loss.backward()
            total, cuts = total + out.loss.detach(), cuts + 1
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return total, grads, cuts

    whole = step(400, 64)
    assert whole[2] == 1
    for budget, chunk in ((15, 3), (30, 1)):
        cut = step(budget, chunk)
        assert cut[2] > 1
        torch.testing.assert_close(cut[0], whole[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(cut[1], whole[1], rtol=1e-4, atol=1e-6)
    scorer = Scorer(backbone, several.views, lambda name: None, 400)
    [micro] = scorer.split(batch)
    second = scorer.hidden(batch, micro)["teacher.1"]
    absent = torch.tensor(COUNTS)[tokens.sequence_ids] < 2
    assert (second[absent] == 0).all() and (second[~absent] != 0).any(1).all()
    for combine in ("average", "mixture"):  # a batch in which nobody has a second one is the method alone
        few = replace(batch, tokens=replace(tokens, privileges=(tokens.privileges > 0).long()),  # type: ignore[operator]
                      contexts={name: contexts[name] for name in ("plain", "privileged")})
        losses = []
        for method in (several.method, replace(several, combine=combine)):
            scorer = Scorer(backbone, method.views, lambda name: None, 400)
            [micro] = scorer.split(few)
            credit, weight, _ = batch_credit(method, few.tokens, {}, reduction="token_mean", length=None,
                                             sampler_cap=None)
            with kernels.off():  # a mixture is not read in place, and the roundings of two ways are no part of this
                losses.append(chunked_loss(method.loss, scorer.hidden(few, micro), scorer.heads(), tokens.tokens,
                                           credit, weight).loss)
        assert torch.allclose(losses[0], losses[1], rtol=1e-6)


# Through a whole run.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("several"))


def run_of(home: Path, name: str, method: str, budget: int = 100_000, **privilege: object) -> list[dict[str, float]]:
    """Metrics of a step; siblings succeed by a score that about half of them reach."""
    shown = {"kind": "demonstration", "threshold": 0.33, **privilege}
    recipe = recipe_of(home, out=str(home / "runs" / name), privilege=shown, method={"name": method},
                       data={"heldout": 0}, optim={"steps": 1, "token_budget": budget},
                       rollout={"num_generations": 6, "stop": [], "max_completion_length": 8})
    finished = selftaught.train(recipe, console=Console(quiet=True))
    return lines(finished.folder / "metrics.jsonl")


@pytest.mark.parametrize(("method", "combine"), [("sdpo", "average"), ("rlsd", "mixture"), ("sdpg", "together")])
def test_a_run_with_three_demonstrations_is_the_same_for_every_cut(home: Path, method: str, combine: str) -> None:
    rows = [run_of(home, f"{method}-{combine}-{budget}", method, budget, count=3, combine=combine)
            for budget in (110, 100_000)]
    for small, large in zip(*rows, strict=True):
        assert small["loss"] == pytest.approx(large["loss"], abs=1e-5)
        assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-3)
        several = small["privilege/teachers"]
        assert several == 1.0 if combine == "together" else 1.0 < several < 3.0
        assert small["privilege/missing"] < 1.0
        assert not any("." in name for name in small), "what belongs to one of the teachers is no metric"
    assert rows[0][0]["grad_norm"] > 1e-4


def test_a_second_demonstration_changes_what_is_learnt_and_how_they_are_combined_too(home: Path) -> None:
    norms = {(count, combine): run_of(home, f"norm-{count}-{combine}", "sdpo", count=count, combine=combine)[0]
             ["grad_norm"] for count, combine in ((1, "average"), (3, "average"), (3, "mixture"), (3, "together"))}
    assert len({round(norm, 9) for norm in norms.values()}) == 4


@pytest.mark.parametrize(("sections", "message"), [
    ({"reward": None, "data": {"heldout": 0}}, r"privilege\.kind: 'demonstration' comes from the verdicts"),
    ({"rollout": {"num_generations": 1}}, r"rollout\.num_generations = 1: a demonstration is another"),
    ({"reward": None, "data": {"heldout": 0}, "privilege": {"kind": "parts", "parts": ["answer", "feedback"]}},
     r"privilege\.kind: 'feedback' comes from the verdicts"),
    ({"reward": None}, r"privilege\.kind: 'demonstration' comes from the verdicts"),  # before what heldout needs
    ({"reward": "numeric", "privilege": {"kind": "feedback"}},
     r"'feedback' is what a verifier says .* 'numeric' says nothing of a wrong one; set reward=FILE\.py:FUNCTION"),
    ({"reward": ["gym", "length"], "privilege": {"kind": "parts", "parts": ["demonstration", "feedback"]}},
     r"'feedback' is what a verifier says .* 'gym' says nothing"),
])  # fmt: skip
def test_what_needs_siblings_or_verdicts_is_refused_without(home: Path, sections: dict, message: str) -> None:
    recipe = recipe_of(home, **{"privilege": {"kind": "demonstration"}, "method": {"name": "opsd"}, **sections})
    with pytest.raises(UserError, match=message):
        make_run(recipe)
