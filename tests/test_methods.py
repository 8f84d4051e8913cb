"""One table of all methods through one suite of laws. A new method is one more row of `TABLE`.

The dense objective from float64 logits is the reference; dense against formulas written out by hand, everything
else against dense. Cases are ragged and asymmetric on purpose: symmetric ones hide swapped arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from own import METHOD
from selftaught.errors import UserError
from selftaught.loss import chunked_loss
from selftaught.methods import batch_credit, build, chunked_objective, method_class, method_fields, names, objective
from selftaught.records import TokenBatch
from selftaught.vocabulary import Head, project, sampled_log_probs


@dataclass(frozen=True)
class Row:
    """A method, the fields it goes through the suite with, and what is left of it when every view is the student:
    `null` names the method (and its fields) that it then equals; None means that nothing is left. `null_fields` are
    those without which that is not so. `null_tolerance` 0: bit for bit.
    `rewards_alone`: where the rewards of a group say nothing, there is no gradient.
    """

    name: str
    variants: tuple[Mapping[str, Any], ...] = ({},)
    null: tuple[str, Mapping[str, Any]] | None = None
    null_fields: Mapping[str, Any] = field(default_factory=dict)
    null_tolerance: float = 0.0
    rewards_alone: bool = False


CLIP_HIGHER = {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0}
NO_CLIP = {"eps_low": None, "eps_high": None}
TABLE = (
    Row("grpo", ({}, {"dual_clip": 3.0, "scale_by_std": False}, NO_CLIP), rewards_alone=True),
    Row("rlsd", ({}, {"lam": 1.0, "eps_w": 0.9, "lam_decay": None, **NO_CLIP, "dual_clip": None}),
        null=("grpo", CLIP_HIGHER), rewards_alone=True),
    Row("opsd", ({}, {"clip": None, "temperature": 1.0}, {"clip": None}, {"temperature": 1.0})),
    Row("dapo", ({}, {"dual_clip": 3.0}), rewards_alone=True),
    Row("dr_grpo", ({}, NO_CLIP), rewards_alone=True),
    Row("gspo", ({}, {"eps_low": 0.1, "eps_high": 0.2}, NO_CLIP), rewards_alone=True),
    Row("cispo", ({}, {"cap": 1.1}, {"cap": math.inf}), rewards_alone=True),
    Row("opd", ({}, {"coef": 0.3})),
    Row("gkd", ({}, {"weight": 0.9, "temperature": 2.0}, {"divergence": "kl_teacher_student", "temperature": 0.7},
                {"divergence": "kl_student_teacher"})),
    Row("sdft", ({}, {"skip": 0}, {"skip": 1, "temperature": 3.0})),
    Row("sdpo", ({}, {"top_k": 5}, {"top_k": 32, "is_cap": 1.1}, {"divergence": "kl_student_teacher", "top_k": 1},
                 {"divergence": "kl_teacher_student", "top_k": None, "is_cap": None})),
    Row("sdpg", ({"beta": 0.1, "alpha": 0.1}, {"beta": 0.5, "beta_warmup": 0, "gate": "all", "exclude_terminal": True},
                 {"reference_kl": "ufkl", "beta": 0.2, "alpha": 0.3, **CLIP_HIGHER},
                 {"reference_kl": "rkl", "beta": 0.2},
                 {"reference_kl": "fkl", "beta": 0.2, "alpha": 0.01}),
        null=("grpo", NO_CLIP), null_fields={"reference_kl": "urkl"}, null_tolerance=1e-12),
    Row("demopsd", ({}, {"top_k": 5, "alpha_max": 1.0}, {"top_k": None, "beta": 5.0, "alpha_max": 0.5, "floor": 0.0}),
        null_fields={"floor": 0.0}),
    Row("dopd", ({}, {"top_k": 5, "trim": 0.3}, {"top_k": None, "trim": 0.0, "beta_weak": 1.0})),
)

ALL = [(row, fields) for row in TABLE for fields in row.variants]
WITH_VIEWS = [(row, fields) for row, fields in ALL if build(row.name, **fields).views]


def spelled(pair: tuple[Row, Mapping[str, Any]]) -> str:
    return ",".join([pair[0].name, *(f"{key}={value}" for key, value in pair[1].items())])


each_method = pytest.mark.parametrize("pair", ALL, ids=spelled)
each_with_views = pytest.mark.parametrize("pair", WITH_VIEWS, ids=spelled)


def test_every_method_that_ships_is_in_the_table() -> None:
    assert sorted(row.name for row in TABLE) == names()


# --- cases ------------------------------------------------------------------------------------------------------------

V, H = 37, 8
LENGTHS = (6, 1, 5, 2, 4, 1, 7, 2, 6, 3, 5, 6, 3)
GROUPS = (40, 40, 40, 40, 7, 7, 7, 7, 21, 21, 21, 21, 3)  # the second group is all equal, the last rollout is alone
REWARDS = (1.0, 0.0, 0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.0, math.nan, 1.0, 1.0, 1.0)
DEAD = {7, 3}


@dataclass(frozen=True)
class Case:
    """A batch with hidden states (N, H) and a head for the student and for each view of a method."""

    batch: TokenBatch
    hidden: dict[str, Tensor]
    heads: dict[str, Head]

    def logits(self) -> dict[str, Tensor]:
        return {view: project(hidden, self.heads[view]) for view, hidden in self.hidden.items()}


@dataclass(frozen=True)
class Kind:
    """What a case is like: the standard deviation of its logits, the log-probs that it comes with, its reduction."""

    std: float = 1.0
    old: bool = False
    sampler: bool = False
    reduction: Mapping[str, Any] = field(default_factory=lambda: {"reduction": "token_mean"})


KINDS = {
    "on_policy": Kind(),
    "on_policy_other_sampler": Kind(sampler=True, reduction={"reduction": "constant", "length": 9}),
    "off_policy": Kind(old=True, reduction={"reduction": "sequence_mean"}),
    "loud": Kind(std=30.0),
    "loud_off_policy_other_sampler": Kind(std=30.0, old=True, sampler=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
THREE = ("on_policy_other_sampler", "off_policy", "loud")  # with one reduction each
three_kinds = pytest.mark.parametrize("kind", [KINDS[name] for name in THREE], ids=THREE)
ON_POLICY = [kind for kind in KINDS.values() if not kind.old]


def normal(*shape: int, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, dtype=torch.float64)


def make_case(pair: tuple[Row, Mapping[str, Any]], kind: Kind, *, seed: int = 0, softcap: bool = True) -> Case:
    """B = 13 ragged rollouts in random order, privileges, masks and stop tokens here and there; all in float64."""
    torch.manual_seed(seed)
    order = torch.randperm(len(LENGTHS))
    lengths = torch.tensor(LENGTHS)[order]
    ids = torch.arange(len(LENGTHS)).repeat_interleave(lengths)
    n = len(ids)
    cap = 3 * kind.std if softcap else None
    hidden = {"student": normal(n, H, std=kind.std / 0.7)}
    heads = {"student": Head(normal(V, H, std=H**-0.5), normal(V, std=0.3), scale=0.7, softcap=cap)}
    for view in build(pair[0].name, **pair[1]).views:
        hidden[view] = hidden["student"] + normal(n, H, std=0.5 * kind.std**0.5)
        heads[view] = Head(heads["student"].weight + normal(V, H, std=0.02), normal(V, std=0.3), scale=0.8, softcap=cap)
    logits = project(hidden["student"], heads["student"])
    likely = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    tokens = torch.where(torch.rand(n) < 0.7, likely, torch.randint(0, V - 5, (n,)).clamp(max=V - 6)).clamp(max=V - 6)
    logp = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    old = logp + normal(n, std=0.5)
    old[::4] -= 1.5  # ratios beyond every clip
    mask = torch.rand(n) > 0.15
    mask[ids == 4] = False  # a whole rollout
    batch = TokenBatch(
        tokens=tokens, sequence_ids=ids, reward=torch.tensor(REWARDS, dtype=torch.float64)[order],
        group=torch.tensor(GROUPS)[order], logp_old=old if kind.old else None, privileged=torch.rand(13) > 0.25,
        terminal=torch.cat([ids[1:] != ids[:-1], torch.tensor([False])]), mask=mask,
        logp_sampler=(old if kind.old else logp) + normal(n, std=0.5) if kind.sampler else None, step=7,
    )  # fmt: skip
    return Case(batch, hidden, heads)


def null_teacher(case: Case) -> Case:
    """Every view is the student."""
    return Case(case.batch, dict.fromkeys(case.hidden, case.hidden["student"]),
                dict.fromkeys(case.heads, case.heads["student"]))


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The same in another precision; the batch's log-probs are in float32 at the lowest."""
    low = torch.float64 if dtype == torch.float64 else torch.float32
    given = {name: value.to(low) for name in ("reward", "logp_old", "logp_sampler")
             if (value := getattr(case.batch, name)) is not None}
    heads = {view: replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
             for view, head in case.heads.items()}
    return Case(replace(case.batch, **given), {view: h.to(dtype) for view, h in case.hidden.items()}, heads)


def leaves(case: Case) -> Case:
    """A copy whose every tensor asks for a gradient, those of the views too."""
    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    heads = {view: replace(head, weight=leaf(head.weight), bias=None if head.bias is None else leaf(head.bias))
             for view, head in case.heads.items()}
    return Case(case.batch, {view: leaf(h) for view, h in case.hidden.items()}, heads)


def gradients(case: Case, view: str = "student") -> list[Tensor | None]:
    head = case.heads[view]
    return [case.hidden[view].grad, head.weight.grad, None if head.bias is None else head.bias.grad]


Outcome = tuple[Tensor, list[Tensor | None]]  # the loss, and the student's gradients: hidden, weight, bias


def dense(pair: tuple[Row, Mapping[str, Any]], case: Case, **options: Any) -> Outcome:
    own = leaves(case)
    loss = objective(pair[0].name, own.batch, own.logits(), **options, **pair[1]).loss
    loss.backward()
    return loss.detach(), gradients(own)


def chunked(pair: tuple[Row, Mapping[str, Any]], case: Case, **options: Any) -> Outcome:
    own = leaves(case)
    loss = chunked_objective(pair[0].name, own.batch, own.hidden, own.heads, **options, **pair[1]).loss
    loss.backward()
    return loss.detach(), gradients(own)


def in_pieces(pair: tuple[Row, Mapping[str, Any]], case: Case, cut: Sequence[Sequence[int]], chunk: int | None, *,
              reduction: str, length: int | None = None) -> Outcome:
    """As the training loop does it: constants once for the batch, then a backward pass for each micro-batch."""
    own, batch, method = leaves(case), case.batch, build(pair[0].name, **pair[1])
    scored = {"student"} | (method.scores & method.views.keys())
    logp = {view: sampled_log_probs(own.hidden[view], own.heads[view], batch.tokens)[0] for view in scored}
    if "student.entropy" in method.scores:
        logp["student.entropy"] = sampled_log_probs(own.hidden["student"], own.heads["student"], batch.tokens,
                                                    entropy=True)[1]
    credit, weight, correction = batch_credit(method, batch, logp, reduction=reduction, length=length, sampler_cap=2.0,
                                              dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for rollouts in cut:
        rows = torch.isin(batch.sequence_ids, torch.tensor(rollouts))
        piece = chunked_loss(method.loss, {view: h[rows] for view, h in own.hidden.items()}, own.heads,
                             batch.tokens[rows], {name: value[rows] for name, value in credit.items()},
                             (weight * correction)[rows], chunk=chunk)
        piece.loss.backward()
        total += piece.loss.detach()
    return total, gradients(own)


def assert_same(got: Outcome, wanted: Outcome, *, tolerance: float = 1e-10) -> None:
    """Within `tolerance` of the largest entry."""
    for a, b in zip([got[0], *got[1]], [wanted[0], *wanted[1]], strict=True):
        assert a is not None and b is not None
        assert a.dtype == b.dtype
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


# --- law 1: the same for every cut ------------------------------------------------------------------------------------

BATCH = [list(range(13))]
ONE_BY_ONE = [[b] for b in range(13)]
UNEVEN = [[0], [1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]


@each_kind
@each_method
def test_loss_and_gradients_do_not_depend_on_how_the_batch_is_cut(pair: Any, kind: Kind) -> None:
    case = make_case(pair, kind)
    whole = dense(pair, case, **kind.reduction)
    assert all(g is not None and g.abs().max() > 1e-6 for g in whole[1])
    for cut, chunk in [(BATCH, 7), (ONE_BY_ONE, None), (UNEVEN, 3)]:
        assert_same(in_pieces(pair, case, cut, chunk, **kind.reduction), whole)


@each_method
def test_chunked_objective_returns_what_objective_returns_at_any_chunk(pair: Any) -> None:
    case = make_case(pair, KINDS["loud_off_policy_other_sampler"])
    one, whole = objective(pair[0].name, case.batch, case.logits(), **pair[1]), dense(pair, case)
    for chunk in (None, 1, 3, 7, len(case.batch.tokens)):
        own = leaves(case)
        many = chunked_objective(pair[0].name, own.batch, own.hidden, own.heads, chunk=chunk, **pair[1])
        many.loss.backward()
        assert_same((many.loss.detach(), gradients(own)), whole)
        torch.testing.assert_close(many.token_loss, one.token_loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(many.credit), dict(one.credit), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(many.metrics), dict(one.metrics), rtol=1e-10, atol=1e-10)


# --- law 2: the teacher matters, and gets no gradient -----------------------------------------------------------------


@each_with_views
def test_moving_a_view_moves_the_students_gradient(pair: Any) -> None:
    case = make_case(pair, KINDS["on_policy"])
    before = dense(pair, case)
    for view in build(pair[0].name, **pair[1]).views:
        torch.manual_seed(1)
        moved = replace(case, hidden=case.hidden | {view: case.hidden[view] + normal(*case.hidden[view].shape)})
        for run in (dense, chunked):
            assert all((a - b).abs().max() > 1e-6 for a, b in zip(run(pair, moved)[1], before[1], strict=True))


@each_with_views
def test_views_get_no_gradient(pair: Any) -> None:
    case = make_case(pair, KINDS["off_policy"])
    own = leaves(case)
    logits = {view: value.detach().requires_grad_() for view, value in own.logits().items()}
    objective(pair[0].name, case.batch, logits, **pair[1]).loss.backward()
    assert logits["student"].grad is not None
    chunked_objective(pair[0].name, case.batch, own.hidden, own.heads, **pair[1]).loss.backward()
    for view in build(pair[0].name, **pair[1]).views:
        assert logits[view].grad is None
        assert gradients(own, view) == [None, None, None]


@each_with_views
def test_a_head_that_student_and_view_share_gets_the_students_gradient_alone(pair: Any) -> None:
    case = make_case(pair, KINDS["on_policy"])
    views = build(pair[0].name, **pair[1]).views
    equal = replace(case, heads={view: case.heads["student"] for view in ("student", *views)})
    shared = leaves(equal)
    tied = replace(shared, heads={view: shared.heads["student"] for view in shared.heads})
    for make in (lambda: objective(pair[0].name, tied.batch, tied.logits(), **pair[1]),
                 lambda: chunked_objective(pair[0].name, tied.batch, tied.hidden, tied.heads, **pair[1])):
        shared.heads["student"].weight.grad = None
        make().loss.backward()
        torch.testing.assert_close(shared.heads["student"].weight.grad, dense(pair, equal)[1][1])


# --- law 3: the null teacher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ON_POLICY, ids=[name for name, kind in KINDS.items() if not kind.old])
@each_with_views
def test_a_teacher_that_is_the_student_adds_nothing(pair: Any, kind: Kind) -> None:
    row, fields = pair
    pair = row, fields = row, {**fields, **row.null_fields}
    same = null_teacher(make_case(pair, kind))
    for run in (dense, chunked):
        loss, grads = run(pair, same, **kind.reduction)
        if row.null is None:
            assert all(x is not None and x.abs().max() < 1e-12 for x in (loss, *grads))
            continue
        name, defaults = row.null
        others = {**defaults, **{k: v for k, v in fields.items() if k in method_fields(method_class(name))}}
        other = run((Row(name), others), same, **kind.reduction)
        assert_same((loss, grads), other, tolerance=row.null_tolerance)


# --- law 4: limits ----------------------------------------------------------------------------------------------------

RLSD = Row("rlsd")
AS_GRPO = (Row("grpo"), CLIP_HIGHER)


@each_kind
@pytest.mark.parametrize(
    ("fields", "step"),
    [({"lam": 0.0}, 7), ({"eps_w": 0.0}, 7), ({}, 50), ({}, 51), ({"lam_decay": 7}, 7)],
    ids=str,
)
def test_rlsd_is_grpo_bit_for_bit_once_its_weight_is_off(fields: Mapping[str, Any], step: int, kind: Kind) -> None:
    case = make_case((RLSD, {}), kind)
    case = replace(case, batch=replace(case.batch, step=step))
    left, right = dense((RLSD, fields), case), dense(AS_GRPO, case)
    assert all(torch.equal(a, b) for a, b in zip((left[0], *left[1]), (right[0], *right[1]), strict=True))
    on = dense((RLSD, {}), replace(case, batch=replace(case.batch, step=49)))
    assert not torch.equal(on[1][0], right[1][0])


@pytest.mark.parametrize("lam", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rlsd_is_grpo_bit_for_bit_when_the_teacher_is_the_old_policy(lam: float, dtype: torch.dtype) -> None:
    case = cast(make_case((RLSD, {}), KINDS["off_policy"]), dtype)
    logits = case.logits()
    old = logits["teacher"].log_softmax(-1).gather(1, case.batch.tokens[:, None]).squeeze(1)
    # As the package itself computes it, so that the evidence is 0 to the last bit.
    old = sampled_log_probs(case.hidden["teacher"], case.heads["teacher"], case.batch.tokens)[0].to(old.dtype)
    case = replace(case, batch=replace(case.batch, logp_old=old))
    left, right = dense((RLSD, {"lam": lam}), case), dense(AS_GRPO, case)
    assert all(torch.equal(a, b) for a, b in zip((left[0], *left[1]), (right[0], *right[1]), strict=True))


def test_grpo_without_clip_is_reinforce_with_a_group_baseline() -> None:
    case = make_case((Row("grpo"), {}), KINDS["on_policy"])
    logits = case.logits()["student"].requires_grad_()
    out = objective("grpo", case.batch, {"student": logits}, **NO_CLIP)
    out.loss.backward()
    counted, advantage = out.credit["counted"], out.credit["advantage"]
    onehot = F.one_hot(case.batch.tokens, V)
    by_hand = -(counted * advantage)[:, None] * (onehot - logits.softmax(-1)) / counted.sum()
    torch.testing.assert_close(logits.grad, by_hand.detach(), rtol=0, atol=1e-15)


def test_opsd_without_clip_at_temperature_1_is_kl_of_teacher_to_student() -> None:
    case = make_case((Row("opsd"), {}), KINDS["loud"])
    logits = {view: value.requires_grad_() for view, value in case.logits().items()}
    out = objective("opsd", case.batch, logits, clip=None, temperature=1.0)
    out.loss.backward()
    log_s, log_t = (logits[view].detach().log_softmax(-1) for view in ("student", "teacher"))
    by_hand = (log_t.exp() * (log_t - log_s)).sum(-1)
    torch.testing.assert_close(out.token_loss, by_hand, rtol=1e-12, atol=1e-12)
    assert by_hand.mean() > 0.1 and not torch.allclose(by_hand, (log_s.exp() * (log_s - log_t)).sum(-1))
    counted = out.credit["counted"]
    gradient = counted[:, None] * (log_s.exp() - log_t.exp()) / counted.sum()
    torch.testing.assert_close(logits["student"].grad, gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 1.1, 3.0])
def test_opsd_caps_every_summand_at_its_temperature(temperature: float) -> None:
    case = make_case((Row("opsd"), {}), KINDS["on_policy"])
    logits = case.logits()
    out = objective("opsd", case.batch, logits, clip=0.01, temperature=temperature)
    s, t = ((logits[view] / temperature).softmax(-1).tolist() for view in ("student", "teacher"))
    by_hand = [sum(min(tv * math.log(tv / sv), 0.01) for sv, tv in zip(*rows, strict=True))
               for rows in zip(s, t, strict=True)]
    torch.testing.assert_close(out.token_loss, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@each_kind
def test_rlsd_token_by_token_in_plain_floats(kind: Kind) -> None:
    case = make_case((RLSD, {}), kind)
    batch, logits = case.batch, case.logits()
    out = objective("rlsd", batch, logits, sampler_cap=None)
    student, teacher = (logits[view].log_softmax(-1) for view in ("student", "teacher"))
    lam = 0.5 * (1 - 7 / 50)
    bounds = set()
    for n, y in enumerate(batch.tokens.tolist()):
        b = int(batch.sequence_ids[n])
        siblings = [r for r, g in zip(batch.reward.tolist(), batch.group.tolist(), strict=True)
                    if g == int(batch.group[b]) and not math.isnan(r)]
        mean = sum(siblings) / len(siblings)
        std = math.sqrt(sum((r - mean) ** 2 for r in siblings) / max(1, len(siblings) - 1))
        reward = float(batch.reward[b])
        advantage = 0.0 if math.isnan(reward) or std == 0 else (reward - mean) / (std + 1e-6)
        logp = float(student[n, y])
        old = logp if batch.logp_old is None else float(batch.logp_old[n])
        d = min(20.0, max(-20.0, float(teacher[n, y]) - old))
        w = min(1.2, max(0.8, math.exp(math.copysign(d, d * advantage)))) if advantage else 1.0
        w = (1 - lam) + lam * w if bool(batch.privileged[b]) else 1.0
        rho, a = math.exp(min(20.0, max(-20.0, logp - old))), advantage * w
        value = min(rho * a, min(1.28, max(0.8, rho)) * a)
        value = max(value, 3 * a) if a < 0 else value
        bounds |= {bound for bound, on in {"high": a > 0 and rho > 1.28, "low": a < 0 and rho < 0.8,
                                           "dual": a < 0 and rho > 3}.items() if on}
        assert float(out.token_loss[n]) == pytest.approx(-value, rel=1e-10, abs=1e-12)
        assert float(out.credit["weight"][n]) == pytest.approx(w, rel=1e-12)
    assert bounds == ({"high", "low", "dual"} if kind.old else set())  # the case meets every one of them


# --- law 5: fast equals dense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("null", [False, True], ids=["teacher", "teacher_is_student"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [KINDS["loud"], KINDS["loud_off_policy_other_sampler"]], ids=["on", "off"])
@each_method
def test_chunked_in_low_precision_is_dense_in_float64_at_real_logit_scale(pair: Any, kind: Kind, dtype: torch.dtype,
                                                                          null: bool) -> None:
    case = make_case(pair, kind)
    usual = dense(pair, case)[1]
    if null:
        case = null_teacher(case)
    low = cast(case, dtype)
    exact = cast(low, torch.float64)  # of the same rounded inputs
    assert 15 < exact.logits()["student"].std() < 45
    loss, grads = chunked(pair, low, chunk=7)
    wanted, references = dense(pair, exact)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(wanted), rel=3e-5, abs=3e-6)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # each gradient is rounded to bfloat16 once, at the end
    for got, reference, scale in zip(grads, references, usual, strict=True):
        assert got is not None and reference is not None and scale is not None and got.dtype == dtype
        allowed = rounding * reference.abs() + 1e-4 * scale.abs().max()
        assert ((got.double() - reference).abs() <= allowed).all()


# --- masks, order, dead groups, banned tokens -------------------------------------------------------------------------


@three_kinds
@each_method
def test_tokens_masked_out_are_as_good_as_removed(pair: Any, kind: Kind) -> None:
    case = make_case(pair, kind)
    ids = case.batch.sequence_ids
    place = torch.arange(len(ids)) - torch.searchsorted(ids, ids)
    mask = (place < 3) | (torch.rand(len(ids)) > 0.4)  # a method may treat the first tokens in a way of its own
    mask[(ids == 3) | ((ids == 8) & (place > 0))] = False
    assert (~mask).sum() > 5 and ((~mask) & (place >= 3)).any()
    masked = replace(case, batch=replace(case.batch, mask=mask))
    fewer = {name: value[mask] for name in ("tokens", "sequence_ids", "logp_old", "terminal", "logp_sampler")
             if (value := getattr(case.batch, name)) is not None}
    removed = Case(replace(case.batch, mask=None, **fewer), {v: h[mask] for v, h in case.hidden.items()}, case.heads)
    for run in (dense, chunked):
        loss, (hidden, *head) = run(pair, masked, **kind.reduction)
        assert hidden is not None and (hidden[~mask] == 0).all()
        assert_same((loss, [hidden[mask], *head]), run(pair, removed, **kind.reduction), tolerance=1e-12)


@three_kinds
@each_method
def test_the_order_of_rollouts_does_not_matter(pair: Any, kind: Kind) -> None:
    case = make_case(pair, kind)
    order = torch.randperm(13)
    rows = torch.cat([(case.batch.sequence_ids == b).nonzero().squeeze(1) for b in order.tolist()])
    moved = {name: value[rows] for name in ("tokens", "logp_old", "terminal", "mask", "logp_sampler")
             if (value := getattr(case.batch, name)) is not None}
    moved |= {name: getattr(case.batch, name)[order] for name in ("reward", "group", "privileged")}
    moved["sequence_ids"] = torch.argsort(order)[case.batch.sequence_ids[rows]]
    permuted = Case(replace(case.batch, **moved), {v: h[rows] for v, h in case.hidden.items()}, case.heads)
    loss, (hidden, *head) = dense(pair, case, **kind.reduction)
    assert hidden is not None
    assert_same(dense(pair, permuted, **kind.reduction), (loss, [hidden[rows], *head]), tolerance=1e-12)


@each_method
def test_what_has_no_say_is_not_counted(pair: Any) -> None:
    case = make_case(pair, KINDS["on_policy"])
    batch = replace(case.batch, mask=None)
    needs = method_class(pair[0].name).needs
    counted = objective(pair[0].name, batch, case.logits(), **pair[1]).credit["counted"]
    assert counted.dtype == torch.bool and counted.any()
    if "reward" in needs:
        assert not counted[torch.isnan(batch.reward)[batch.sequence_ids]].any()
    elif "privilege" in needs:
        assert not counted[~batch.privileged[batch.sequence_ids]].any()


SILENCE = {"no privilege": {"privileged": torch.zeros(13, dtype=torch.bool)},
           "no score": {"reward": torch.full((13,), math.nan, dtype=torch.float64)},
           "no token": {"mask": torch.zeros(sum(LENGTHS), dtype=torch.bool)}}
MUTED_BY = {row.name: "no score" if "reward" in (needs := method_class(row.name).needs) else
            "no privilege" if "privilege" in needs else "no token" for row in TABLE}
SILENT = [(pair, cause) for pair in ALL for cause in sorted({MUTED_BY[pair[0].name], "no token"})]


@three_kinds
@pytest.mark.parametrize(("pair", "cause"), SILENT, ids=lambda x: x if isinstance(x, str) else spelled(x))
def test_a_batch_in_which_nothing_counts_has_a_zero_loss_and_no_gradient(pair: Any, cause: str, kind: Kind) -> None:
    case = make_case(pair, kind)
    silent = replace(case, batch=replace(case.batch, **SILENCE[cause]))
    for run in (dense, chunked):
        loss, grads = run(pair, silent, **kind.reduction)
        assert loss == 0 and all(g is not None and (g == 0).all() for g in grads)
        assert run(pair, case, **kind.reduction)[0] != 0


@three_kinds
@pytest.mark.parametrize("pair", [pair for pair in ALL if pair[0].rewards_alone], ids=spelled)
def test_groups_whose_rewards_say_nothing_give_no_gradient(pair: Any, kind: Kind) -> None:
    case = make_case(pair, kind)
    dead = torch.isin(case.batch.group, torch.tensor([*DEAD]))[case.batch.sequence_ids]
    hidden = dense(pair, case)[1][0]
    assert (hidden[dead] == 0).all() and (hidden[~dead & case.batch.mask] != 0).any()
    for reward in (torch.full((13,), 0.3), torch.full((13,), math.nan)):
        silent = replace(case, batch=replace(case.batch, reward=reward))
        loss, grads = chunked(pair, silent)
        assert loss == 0 and all(g is not None and (g == 0).all() for g in grads)


def banned_case(pair: Any, kind: Kind) -> Case:
    """The last five entries of the vocabulary are at -inf in every view."""
    case = make_case(pair, kind, softcap=False)
    ban = torch.zeros(V, dtype=torch.float64)
    ban[-5:] = -math.inf
    heads = {view: replace(head, bias=head.bias + ban) for view, head in case.heads.items() if head.bias is not None}
    return replace(case, heads=heads)


@three_kinds
@each_method
def test_tokens_banned_in_all_views_are_as_good_as_not_in_the_vocabulary(pair: Any, kind: Kind) -> None:
    case = banned_case(pair, kind)
    smaller = replace(case, heads={view: replace(head, weight=head.weight[:-5], bias=head.bias[:-5])
                                   for view, head in case.heads.items() if head.bias is not None})
    for run in (dense, chunked):
        loss, (hidden, weight, bias) = run(pair, case, **kind.reduction)
        assert weight is not None and bias is not None and (weight[-5:] == 0).all() and (bias[-5:] == 0).all()
        assert_same((loss, [hidden, weight[:-5], bias[:-5]]), run(pair, smaller, **kind.reduction), tolerance=1e-12)


@three_kinds
@each_method
def test_a_sampled_token_that_is_banned_leaves_everything_finite(pair: Any, kind: Kind) -> None:
    case = banned_case(pair, kind)
    tokens = case.batch.tokens.clone()
    tokens[::4] = V - 1
    case = replace(case, batch=replace(case.batch, tokens=tokens))
    for run in (dense, chunked):
        loss, grads = run(pair, case, **kind.reduction)
        assert all(x is not None and torch.isfinite(x).all() for x in (loss, *grads))
    out = chunked_objective(pair[0].name, case.batch, case.hidden, case.heads, chunk=5, **pair[1])
    for values in (out.credit, out.metrics, {"token_loss": out.token_loss}):
        assert not any(torch.isnan(value).any() for value in values.values())
    assert torch.isfinite(out.token_loss).all()


@three_kinds
@pytest.mark.parametrize("pair", [p for p in ALL if "reward" not in method_class(p[0].name).needs], ids=spelled)
def test_who_needs_no_reward_reads_neither_rewards_nor_groups(pair: Any, kind: Kind) -> None:
    """All-equal groups, groups of one, no scores: not a bit of the loss or of a gradient moves."""
    case = make_case(pair, kind)
    for run in (dense, chunked):
        expected = run(pair, case, **kind.reduction)
        for changed in ({"reward": torch.full((13,), 0.5, dtype=torch.float64)}, {"group": torch.arange(13)},
                        {"reward": torch.full((13,), math.nan, dtype=torch.float64)}):
            other = replace(case, batch=replace(case.batch, **changed))
            assert_same(run(pair, other, **kind.reduction), expected, tolerance=0.0)


@three_kinds
@pytest.mark.parametrize("pair", [p for p in ALL if p[0].name == "sdpg" and p[1].get("gate") != "all"], ids=spelled)
def test_in_a_group_whose_rewards_say_nothing_sdpg_keeps_to_its_reference_alone(pair: Any, kind: Kind) -> None:
    case = make_case(pair, kind)
    dead = torch.isin(case.batch.group, torch.tensor([*DEAD]))[case.batch.sequence_ids] & case.batch.mask
    whole = objective("sdpg", case.batch, case.logits(), **pair[1]).token_loss
    without = objective("sdpg", case.batch, case.logits(), **{**pair[1], "beta": 0.0}).token_loss
    assert torch.equal(whole[dead], without[dead]) and (whole[~dead] != without[~dead]).any()


@three_kinds
@each_with_views
def test_what_a_rollout_without_privilege_would_be_told_is_not_read(pair: Any, kind: Kind) -> None:
    """A teacher's states in the place of a missing privilege are no numbers of anybody."""
    case = make_case(pair, kind)
    unseen = ~case.batch.privileged[case.batch.sequence_ids]
    views = {name: view for name, view in build(pair[0].name, **pair[1]).views.items() if view.context == "privileged"}
    assert unseen.any() and (views or pair[0].name in ("opd", "gkd"))
    moved = {name: torch.where(unseen[:, None], -3 * h, h) if name in views else h for name, h in case.hidden.items()}
    for run in (dense, chunked):
        assert_same(run(pair, replace(case, hidden=moved), **kind.reduction), run(pair, case, **kind.reduction),
                    tolerance=1e-12)


SAMPLED = {row.name for row in TABLE if row.rewards_alone} | {"opd"}  # which read nothing but the sampled tokens


@three_kinds
@pytest.mark.parametrize("who", ["student", "teachers"])
@each_method
def test_what_one_side_alone_bans_may_be_infinite_and_is_never_nan(pair: Any, who: str, kind: Kind) -> None:
    """A divergence from what cannot be to what can is infinite; what reads sampled tokens alone stays finite."""
    case = make_case(pair, kind, softcap=False)
    ban = torch.zeros(V, dtype=torch.float64)
    ban[-5:] = -math.inf
    heads = {view: replace(head, bias=head.bias + ban) if (view == "student") == (who == "student") else head
             for view, head in case.heads.items() if head.bias is not None}
    tokens = case.batch.tokens.clone()
    tokens[::4] = V - 1
    for batch in (case.batch, replace(case.batch, tokens=tokens)):
        told = objective(pair[0].name, batch, replace(case, heads=heads).logits(), **pair[1])
        assert not torch.isnan(told.token_loss).any()
        if pair[0].name in SAMPLED:
            assert torch.isfinite(told.token_loss).all()
        for run in (dense, chunked) if torch.isfinite(told.token_loss).all() else ():
            loss, grads = run(pair, replace(case, batch=batch, heads=heads), **kind.reduction)
            assert all(x is not None and torch.isfinite(x).all() for x in (loss, *grads))


@each_method
def test_a_log_prob_of_minus_infinity_that_comes_with_the_batch_leaves_everything_finite(pair: Any) -> None:
    case = make_case(pair, KINDS["loud_off_policy_other_sampler"])
    assert case.batch.logp_old is not None and case.batch.logp_sampler is not None
    for name in ("logp_old", "logp_sampler"):
        gone = getattr(case.batch, name).clone()
        gone[::5] = -math.inf
        for run in (dense, chunked):
            loss, grads = run(pair, replace(case, batch=replace(case.batch, **{name: gone})), sampler_cap=2.0)
            assert all(x is not None and torch.isfinite(x).all() for x in (loss, *grads))


# --- reductions, sampler, step, precision -----------------------------------------------------------------------------


@each_method
def test_each_reduction_is_its_formula(pair: Any) -> None:
    case = make_case(pair, KINDS["off_policy"])
    ids = case.batch.sequence_ids.tolist()
    loss, credit = {}, {}
    for how, length in (("token_mean", None), ("sequence_mean", None), ("constant", 11)):
        out = objective(pair[0].name, case.batch, case.logits(), reduction=how, length=length, **pair[1])
        loss[how], credit = float(out.loss), out.credit
    rows: dict[int, list[float]] = {b: [] for b in range(13)}
    for value, counted, b in zip(out.token_loss.tolist(), credit["counted"].tolist(), ids, strict=True):
        rows[b] += [value] if counted else []
    assert [] in rows.values()
    every = [value for row in rows.values() for value in row]
    means = [sum(row) / len(row) for row in rows.values() if row]
    assert loss["token_mean"] == pytest.approx(sum(every) / len(every), rel=1e-12)
    assert loss["sequence_mean"] == pytest.approx(sum(means) / len(means), rel=1e-12)
    assert loss["constant"] == pytest.approx(sum(every) / (13 * 11), rel=1e-12)


@pytest.mark.parametrize("kind", ["on_policy_other_sampler", "loud_off_policy_other_sampler"])
@each_method
def test_the_samplers_log_probs_scale_each_token_loss_by_a_capped_constant(pair: Any, kind: str) -> None:
    case = make_case(pair, KINDS[kind])
    own = leaves(case)
    plain = objective(pair[0].name, case.batch, own.logits(), sampler_cap=None, **pair[1])
    logp = own.logits()["student"].log_softmax(-1).gather(1, case.batch.tokens[:, None]).squeeze(1).detach()
    factor = torch.exp((logp if case.batch.logp_old is None else case.batch.logp_old) - case.batch.logp_sampler)
    assert (factor > 1.5).any() and (factor < 0.9).any()
    counted = plain.credit["counted"]
    by_hand = (plain.token_loss * factor.clamp(max=1.5))[counted].sum() / counted.sum()
    by_hand.backward()
    for run in (dense, chunked):
        assert_same(run(pair, case, sampler_cap=1.5), (by_hand.detach(), gradients(own)), tolerance=1e-12)
    without = replace(case, batch=replace(case.batch, logp_sampler=None))
    assert_same(dense(pair, case, sampler_cap=None), dense(pair, without), tolerance=0.0)


@each_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_float64_in_is_float64_out_and_float32_stays_float32(pair: Any, dtype: torch.dtype) -> None:
    case = cast(make_case(pair, KINDS["off_policy"]), dtype)
    for out in (objective(pair[0].name, case.batch, case.logits(), **pair[1]),
                chunked_objective(pair[0].name, case.batch, case.hidden, case.heads, **pair[1])):
        assert out.loss.dtype == out.token_loss.dtype == dtype


@each_method
def test_the_smallest_batch_goes_through(pair: Any) -> None:
    """Tokens, rollouts and logits alone: every optional field left out."""
    logits = {view: normal(2, V) for view in ("student", *build(pair[0].name, **pair[1]).views)}
    batch = TokenBatch(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    logits["student"].requires_grad_()
    every_token = {"skip": 0} if pair[0].name == "sdft" else {}
    out = objective(pair[0].name, batch, logits, **pair[1] | every_token)
    out.loss.backward()
    assert out.credit["counted"].all() and torch.isfinite(out.loss) and (logits["student"].grad != 0).any()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("rlds", {}, r"unknown method 'rlds'; did you mean 'rlsd'\?"),
        ("zzzzzz", {}, r"unknown method 'zzzzzz'; known: .*grpo"),
        ("rlsd", {"epsw": 0.1}, r"'rlsd' has no field 'epsw'; did you mean 'eps_w'\?"),
        ("grpo", {"epslow": 0.1}, r"did you mean 'eps_low'\?"),
        ("rlsd", {"views": {}}, "has no field 'views'"),
        ("rlsd", {"teacher": {"evry": 5}}, r"view 'teacher' has no field 'evry'; did you mean 'every'\?"),
        ("rlsd", {"eps_w": 1.0}, r"'rlsd': eps_w = 1.0: must be in \[0, 1\)"),
        ("rlsd", {"lam": 1.5}, "lam = 1.5"),
        ("opsd", {"temperature": 0.0}, "temperature = 0.0"),
        ("opsd", {"clip": 0.0}, "clip = 0.0"),
        ("gkd", {"weight": "0.5"}, r"'gkd': weight = '0.5': must be a number \(in YAML"),
        ("gkd", {"weight": 0}, r"weight = 0: must be in \(0, 1\); at the ends choose a kl by its name"),
        ("gkd", {"weight": math.nan}, r"weight = nan: must be in \(0, 1\)"),
        ("no_such_package.module:Mine", {}, "cannot be imported"),
        ("missing.py:Mine", {}, "there is no file 'missing.py'"),
        ("math:Mine", {}, "math has no 'Mine'"),
    ],
)
def test_a_name_or_value_that_cannot_be_is_refused_with_the_nearest(name: str, fields: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(name, **fields)


@pytest.mark.parametrize("value", ["false", "no", 1, None], ids=repr)
def test_a_switch_is_true_or_false_and_nothing_else_that_python_takes_for_it(value: Any) -> None:
    switches = [(name, key) for name in names() for key, default in method_fields(method_class(name)).items()
                if isinstance(default, bool)]
    assert {("grpo", "scale_by_std"), ("sdpg", "exclude_terminal")} <= {*switches}
    for name, key in switches:
        with pytest.raises(UserError, match=rf"'{name}': {key} = {value!r}: must be true or false"):
            build(name, **{key: value})
        assert [getattr(build(name, **{key: on}), key) for on in (True, False)] == [True, False]


def test_a_method_in_a_file_of_the_users_own_has_its_formula(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METHOD)
    batch, logits = small()
    got = objective(f"{path}:Mine", batch, logits, scale=3.0)
    logp, teacher = (torch.log_softmax(logits[view], -1)[range(3), batch.tokens] for view in ("student", "teacher"))
    torch.testing.assert_close(got.token_loss, -3 * (teacher > logp) * logp)
    assert method_fields(method_class(f"{path}:Mine")) == {"scale": 1.0}
    path.write_text(METHOD.replace("-self.scale", "self.scale"))  # edited: it counts as it is now
    torch.testing.assert_close(objective(f"{path}:Mine", batch, logits, scale=3.0).token_loss, -got.token_loss)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    def credit", "    def crdit", "lacks credit; a method has name, needs, views, scores, credit, loss"),
        ("    needs:", "    nedes:", "lacks needs;"),
        ("    scores:", "    scors:", "lacks scores;"),
        ("    views:", "    vews:", "lacks views;"),
        ("    def loss", "    def los", "lacks loss;"),
        ("@dataclass(frozen=True)\n", "", "is no dataclass"),
        ("scale: float = 1.0\n    views: Mapping[str, View] = field(default_factory=lambda: {", "scale: float\n"
         "    views: Mapping[str, View] = field(kw_only=True, default_factory=lambda: {", "fields at their defaults: "),
        ("class Mine", "class Yours", "mine.py has no 'Mine'"),
        ("@dataclass", "None.x\n@dataclass", "cannot be imported: AttributeError: 'NoneType' object has no attribute"),
        ("class Mine:", "class Mine", "cannot be imported: expected ':'"),
    ],
)  # fmt: skip
def test_a_file_without_a_whole_method_is_refused_by_what_is_missing(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = tmp_path / "mine.py"
    assert METHOD.count(old) == 1
    path.write_text(METHOD.replace(old, new))
    with pytest.raises(UserError, match=re.escape(words)):
        build(f"{path}:Mine")


def test_a_view_may_be_changed_by_its_fields_alone() -> None:
    view = build("rlsd", teacher={"every": 5}).views["teacher"]
    assert (view.weights, view.context, view.every) == ("snapshot", "privileged", 5)


def small() -> tuple[TokenBatch, dict[str, Tensor]]:
    batch = TokenBatch(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    return batch, {"student": torch.randn(3, 5), "teacher": torch.randn(3, 5)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_ids": torch.tensor([0, 1])}, r"TokenBatch.sequence_ids has shape \(2,\), tokens have \(3,\)"),
        ({"logp_old": torch.zeros(3, 1)}, "TokenBatch.logp_old"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "TokenBatch.mask"),
        ({"logp_sampler": torch.zeros(1)}, "TokenBatch.logp_sampler"),
        ({"terminal": torch.zeros(2, dtype=torch.bool)}, "TokenBatch.terminal"),
        ({"reward": torch.zeros(1)}, r"TokenBatch.reward has shape \(1,\), the batch has 2 rollouts"),
        ({"group": torch.zeros(3, dtype=torch.int64)}, "the batch has 3 rollouts"),
        ({"privileged": torch.ones(1, dtype=torch.bool)}, "TokenBatch.privileged"),
        ({"reward": None}, "needs `reward`"),
        ({"group": None}, "needs `reward` .* and `group`"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_batch_whose_parts_disagree_is_refused_by_the_name_of_the_part(change: Any, words: str) -> None:
    batch, logits = small()
    with pytest.raises(ValueError, match=words):
        objective("rlsd", replace(batch, **change), logits)
    with pytest.raises(ValueError, match=words):
        chunked_objective("rlsd", replace(batch, **change), logits, dict.fromkeys(logits, torch.randn(7, 5)))


def test_views_that_are_missing_or_do_not_fit_are_refused_by_name() -> None:
    batch, logits = small()
    with pytest.raises(ValueError, match="'opsd' needs logits or hidden states of 'teacher'; given: student"):
        objective("opsd", batch, {"student": logits["student"]})
    with pytest.raises(ValueError, match="of 'student'"):
        objective("opsd", batch, {"teacher": logits["teacher"]})
    with pytest.raises(ValueError, match="'teacher' has 2 rows, the batch has 3 tokens"):
        objective("opsd", batch, {**logits, "teacher": torch.randn(2, 5)})
    with pytest.raises(ValueError, match="'teacher' has a vocabulary of 6, the student one of 5"):
        objective("opsd", batch, {**logits, "teacher": torch.randn(3, 6)})
    with pytest.raises(ValueError, match="'teacher' need a head in `heads`; given: student"):
        chunked_objective("opsd", batch, logits, {"student": torch.randn(7, 5)})
    with pytest.raises(ValueError, match="'teacher' have width 5, its head takes 4"):
        chunked_objective("opsd", batch, logits, {"student": torch.randn(7, 5), "teacher": torch.randn(7, 4)})


def test_a_padded_vocabulary_is_no_obstacle_where_the_teacher_is_read_at_the_sampled_token_alone() -> None:
    batch, logits = small()
    padded = F.pad(logits["teacher"], (0, 3), value=-math.inf)
    wanted = objective("rlsd", batch, logits)
    got = objective("rlsd", batch, {**logits, "teacher": padded})
    torch.testing.assert_close(got.loss, wanted.loss)


def test_reductions_that_cannot_be_are_refused() -> None:
    batch, logits = small()
    with pytest.raises(ValueError, match="unknown reduction 'mean'; known: token_mean, sequence_mean, constant"):
        objective("grpo", batch, logits, reduction="mean")
    with pytest.raises(ValueError, match="needs `length`"):
        objective("grpo", batch, logits, reduction="constant")
