"""What is true between methods, and what their papers claim, on small tables of probabilities.

Expectations are sums over the whole vocabulary, never samples. Where a paper's own statement does not hold, a test
holds what does, and shows the paper's version failing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import selftaught
from own import make_home, recipe_of
from selftaught.credit import routes, trapezoid
from selftaught.errors import UserError
from selftaught.loss import barycenter, clipped_loss, js, kl, mixture, reference_penalty, with_tail
from selftaught.methods import build, method_fields, names, objective
from selftaught.methods.base import method_class
from selftaught.records import TokenBatch
from selftaught.run import make_run
from tabular import LENGTHS, V, close, distributions, gradient, make_case, outcome, same

SEEDS = pytest.mark.parametrize("seed", range(5))
PLAIN = {"eps_low": None, "eps_high": None}


# --- what equals what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "step"), [({"lam": 0.0}, 7), ({"eps_w": 0.0}, 7), ({}, 50), ({}, 90)], ids=str)
@pytest.mark.parametrize("old", [False, True])
def test_rlsd_is_dapo_with_dual_clip_3_once_its_weight_is_off(old: bool, fields: Mapping[str, Any], step: int) -> None:
    case = make_case(old=old, step=step)
    assert same(outcome("rlsd", case, **fields), outcome("dapo", case, dual_clip=3.0))
    assert not same(outcome("rlsd", make_case(old=old)), outcome("dapo", case, dual_clip=3.0))


def test_rlsd_is_dapo_with_dual_clip_3_when_the_teacher_is_the_student_or_the_old_policy() -> None:
    batch, logits = make_case()
    equal = (batch, {**logits, "teacher": logits["student"]})
    assert same(outcome("rlsd", equal), outcome("dapo", equal, dual_clip=3.0))
    # Near enough to the student for the surrogate not to be clipped everywhere.
    old = logits["student"] + 0.1 * logits["teacher"]
    logp = old.log_softmax(-1).gather(1, batch.tokens[:, None]).squeeze(1)  # to the bit: as a distribution takes it
    stale = (replace(batch, logp_old=logp), {**logits, "teacher": old})
    assert same(outcome("rlsd", stale), outcome("dapo", stale, dual_clip=3.0))


@pytest.mark.parametrize("old", [False, True])
def test_dapo_is_grpo_with_a_higher_clip_and_dr_grpo_is_grpo_without_the_std(old: bool) -> None:
    case = make_case(old=old)
    assert same(outcome("dapo", case), outcome("grpo", case, eps_high=0.28))
    assert same(outcome("dr_grpo", case), outcome("grpo", case, scale_by_std=False))
    assert not same(outcome("dr_grpo", case), outcome("grpo", case))


@pytest.mark.parametrize("old", [False, True])
def test_sdpg_without_alpha_and_beta_is_grpo_without_clip(old: bool) -> None:
    case = make_case(old=old)
    assert same(outcome("sdpg", case, alpha=0.0, beta=0.0), outcome("grpo", case, **PLAIN), 1e-15)
    assert not same(outcome("sdpg", case, alpha=0.0, beta=0.1), outcome("grpo", case, **PLAIN), 1e-5)


def test_sdpgs_distillation_has_no_gradient_when_the_teacher_is_the_student() -> None:
    batch, logits = make_case(old=True)
    case = (batch, {**logits, "teacher": logits["student"]})
    assert same(outcome("sdpg", case, alpha=0.0, beta=5.0, gate="all"), outcome("grpo", case, **PLAIN), 1e-14)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize("off", [{"alpha_max": 0.0}, {"beta": 0.0}], ids=str)
def test_demopsd_without_blend_is_sdpo_with_kl_of_student_to_teacher(off: Any, top_k: int | None, old: bool) -> None:
    case = make_case(old=old)
    sdpo = outcome("sdpo", case, divergence="kl_student_teacher", top_k=top_k)
    assert same(outcome("demopsd", case, top_k=top_k, floor=0.0, **off), sdpo, 1e-12)
    assert not same(outcome("demopsd", case, top_k=top_k, floor=0.0), sdpo, 1e-4)


def test_gkd_with_js_of_equal_weights_is_sdpo_on_the_whole_vocabulary() -> None:
    case = make_case()
    assert same(outcome("gkd", case), outcome("sdpo", case, top_k=None))
    assert not same(outcome("gkd", case, weight=0.4), outcome("sdpo", case, top_k=None))


def test_opsd_without_clip_sdft_without_skip_and_gkd_by_kl_of_teacher_to_student_are_one() -> None:
    case = make_case()
    opsd = outcome("opsd", case, clip=None, temperature=1.0)
    assert same(opsd, outcome("sdft", case, skip=0)) and same(opsd, outcome("gkd", case,
                                                                            divergence="kl_teacher_student"))
    assert not same(opsd, outcome("sdft", case))


def test_sdft_does_not_count_the_first_tokens_of_each_rollout() -> None:
    batch, logits = make_case()
    counted = objective("sdft", batch, logits, skip=2).credit["counted"]
    assert counted.tolist() == [place >= 2 for length in LENGTHS for place in range(length)]


@pytest.mark.parametrize("cap", [math.inf, 1.05])
def test_cispo_has_grpos_gradient_but_not_its_value_while_the_cap_is_infinite(cap: float) -> None:
    case = make_case(old=True)
    (value, found), (other, wanted) = outcome("cispo", case, cap=cap), outcome("grpo", case, **PLAIN)
    assert close(found, wanted, 1e-15) is (cap == math.inf) and not close(value, other, 1e-3)


@pytest.mark.parametrize(("eps_low", "eps_high"), [(3e-4, 4e-4), (0.1, 0.2), (None, None)])
def test_gspos_gradient_is_that_of_its_rollout_ratio(eps_low: float | None, eps_high: float | None) -> None:
    batch, logits = make_case(old=True)
    advantage = objective("grpo", batch, logits).credit["advantage"]

    def by_hand(student: Tensor) -> Tensor:
        change = student.log_softmax(-1).gather(1, batch.tokens[:, None]).squeeze(1) - batch.logp_old
        total = torch.zeros((), dtype=torch.float64)
        for b in range(len(LENGTHS)):
            rows = batch.sequence_ids == b
            s, a = change[rows].mean().exp(), advantage[rows][0]
            bound = s if eps_low is None else s.clamp(1 - eps_low, 1 + eps_high)
            total = total - torch.minimum(s * a, bound * a) / len(LENGTHS)
        return total

    loss, found = outcome("gspo", (batch, logits), reduction="sequence_mean", eps_low=eps_low, eps_high=eps_high)
    assert close(loss, by_hand(logits["student"])) and close(found, gradient(by_hand, logits["student"]))
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("clip", [{"eps_low": 3e-4, "eps_high": 4e-4}, {"eps_low": 0.2, "eps_high": 0.28}, PLAIN],
                         ids=str)
def test_gspo_is_grpo_with_the_same_clip_on_rollouts_of_one_token_and_on_policy(clip: Mapping[str, Any]) -> None:
    on_policy, stale = make_case(), make_case(old=True)
    assert same(outcome("gspo", on_policy, **clip), outcome("grpo", on_policy, **clip), 1e-15)
    batch, logits = stale
    n = len(batch.tokens)
    short = replace(batch, sequence_ids=torch.arange(n), reward=batch.reward[batch.sequence_ids] + 0.1 * torch.rand(n),
                    group=batch.group[batch.sequence_ids])
    assert same(outcome("gspo", (short, logits), **clip), outcome("grpo", (short, logits), **clip), 1e-15)
    assert not same(outcome("gspo", stale, **clip), outcome("grpo", stale, **clip), 1e-4)


@pytest.mark.parametrize("name", ["sdpo", "demopsd", "opsd", "sdft", "gkd", "dopd"])
def test_nothing_is_left_when_every_view_is_the_student(name: str) -> None:
    batch, logits = make_case()
    floor = {"floor": 0.0} if "floor" in method_fields(method_class(name)) else {}
    loss, found = outcome(name, (batch, dict.fromkeys(logits, logits["student"])), **floor)
    assert loss.abs() < 1e-15 and found.abs().max() < 1e-15
    assert outcome(name, (batch, logits), **floor)[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["opd", "gkd"])
@pytest.mark.parametrize("context", ["plain", "privileged"])
def test_rollouts_without_a_privilege_are_taught_by_an_external_teacher_only_where_it_sees_none(name: str,
                                                                                                context: str) -> None:
    batch, logits = make_case()
    batch = replace(batch, privileged=torch.tensor([True, False, True, False, True, True]))
    out = objective(name, batch, logits, teacher={"weights": "external", "context": context})
    with_one = batch.privileged[batch.sequence_ids]
    assert out.credit["counted"].equal(with_one if context == "privileged" else torch.ones_like(with_one))


@SEEDS
def test_opds_expected_gradient_is_that_of_kl_of_student_to_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    z, teacher = torch.randn(V, dtype=torch.float64), distributions(V)
    rows = z.expand(V, V).clone().requires_grad_()  # each token once, weighed by its probability
    batch = TokenBatch(torch.arange(V), torch.arange(V))
    out = objective("opd", batch, {"student": rows, "teacher": teacher.expand(V, V)}, coef=0.7)
    (out.token_loss * z.softmax(-1)).sum().backward()
    assert close(rows.grad.sum(0), 0.7 * gradient(lambda x: kl(x.log_softmax(-1), teacher), z))


# --- divergences ------------------------------------------------------------------------------------------------------


@SEEDS
def test_js_at_its_ends_is_another_function_than_the_kls_that_it_tends_to_when_divided(seed: int) -> None:
    torch.manual_seed(seed)
    t, s = distributions(V), distributions(V)
    small = 1e-6
    assert js(t, s, small) < 1e-4 and js(t, s, 1 - small) < 1e-4
    assert float(js(t, s, small) / small) == pytest.approx(float(kl(t, s)), rel=1e-4)
    assert float(js(t, s, 1 - small) / small) == pytest.approx(float(kl(s, t)), rel=1e-4)
    for weight in (0.0, 1.0):
        with pytest.raises(UserError, match=r"weight = .*must be in \(0, 1\); at the ends choose a kl"):
            build("gkd", weight=weight)


@SEEDS
def test_js_is_at_most_ln_2_and_near_by_a_quarter_of_kl_with_half_the_gradient_to_the_middle(seed: int) -> None:
    torch.manual_seed(seed)
    far = js(distributions(V, std=40), distributions(V, std=40))
    z, t = torch.randn(V, dtype=torch.float64), distributions(V)
    s = z.log_softmax(-1)
    assert 0.1 < far <= math.log(2) + 1e-15
    near = (z + 1e-3 * torch.randn(V, dtype=torch.float64)).log_softmax(-1)
    assert float(js(s, near) / kl(s, near)) == pytest.approx(0.25, abs=1e-3)
    middle = mixture((s, t), (0.5, 0.5))
    assert close(middle.exp(), (s.exp() + t.exp()) / 2)
    found = gradient(lambda x: js(x.log_softmax(-1), t), z)
    assert close(found, s.exp() * (s - middle - kl(s, middle)) / 2)


@SEEDS
@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_tail_bucket_keeps_a_divergence_below_the_full_one_where_raw_sums_may_be_negative(k: int, seed: int) -> None:
    torch.manual_seed(seed)
    s, t = distributions(200, V), distributions(200, V)
    own, theirs = with_tail(k, s, t)
    assert own.shape == (200, k + 1) and close(own.exp().sum(-1), torch.ones(200)) and close(
        theirs.exp().sum(-1), torch.ones(200))
    for divergence in (kl, js):
        assert (divergence(own, theirs) >= -1e-15).all() and (divergence(own, theirs) <= divergence(s, t) + 1e-15).all()
    top = t.topk(k).indices  # on the teacher's tokens, without the rest: no divergence
    raw = (s.exp() * (s - t)).gather(1, top).sum(-1)
    assert (raw < 0).float().mean() > 0.05


@pytest.mark.parametrize("case", ["ordinary", "banned", "nothing left", "below float32's range"])
def test_a_tail_has_the_value_and_gradient_of_the_log_sum_exp_of_the_rest(case: str) -> None:
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    if case == "banned":
        z[:, 3] = -math.inf
    elif case == "nothing left":
        z[1, torch.arange(9) != 5] = -math.inf
        z[1, 4] = 1.0
    elif case == "below float32's range":
        z[2, :7] -= 200.0
    top = z.topk(2, dim=-1).indices
    found, wanted = (z.clone().requires_grad_() for _ in range(2))
    tail = with_tail(2, found)[0][:, -1]
    rest = wanted.log_softmax(-1).scatter(-1, top, -math.inf)
    alive = rest.amax(-1) > -math.inf
    expected = torch.logsumexp(rest[alive], -1)
    torch.testing.assert_close(tail[alive], expected)
    assert (tail[~alive] == -math.inf).all() and int((~alive).sum()) == (case == "nothing left")
    (gradient,) = torch.autograd.grad(expected.sum(), wanted)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(tail[alive].sum(), found, retain_graph=True)[0], gradient)


def test_the_tail_is_exact_where_the_kept_tokens_hold_nearly_everything() -> None:
    logits = torch.tensor([[60.0, 30.0, 0.0, -1.0]])
    tail = with_tail(2, logits.log_softmax(-1))[0][0, -1]
    assert float(tail) == pytest.approx(math.log(1 + math.exp(-1)) - 60, abs=1e-4)
    assert torch.log(1 - logits.softmax(-1)[0, :2].sum()) == -math.inf  # the naive form


# --- SDPG (arXiv 2606.04036) ------------------------------------------------------------------------------------------


@SEEDS
def test_sdpg_s1_distillation_is_policy_gradient_with_a_centred_advantage(seed: int) -> None:
    torch.manual_seed(seed)
    z, q = torch.randn(V, dtype=torch.float64), distributions(V)
    p = z.log_softmax(-1)
    advantage = kl(p, q) - (p - q)
    assert abs(float((p.exp() * advantage).sum())) < 1e-14
    as_policy = gradient(lambda x: -(p.exp() * advantage * x.log_softmax(-1)).sum(), z)
    exact = gradient(lambda x: kl(x.log_softmax(-1), q), z)
    assert close(exact, as_policy) and close(exact, p.exp() * (p - q - kl(p, q)))


@SEEDS
@pytest.mark.parametrize("kind", ["urkl", "rkl", "ufkl", "fkl"])
def test_sdpg_s2_each_penalty_has_the_expected_gradient_of_its_kl(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    z, ref = torch.randn(V, dtype=torch.float64), distributions(V)
    p = z.softmax(-1)
    expected = gradient(lambda x: (p * reference_penalty(kind, x.log_softmax(-1), ref)).sum(), z)
    reverse, forward = (gradient(lambda x, f=f: f(x.log_softmax(-1)), z)
                        for f in (lambda s: kl(s, ref), lambda s: kl(ref, s)))
    assert close(expected, reverse if "rkl" in kind else forward)
    assert not close(expected, forward if "rkl" in kind else reverse, 1e-3)
    at_ref = gradient(lambda s: reference_penalty(kind, s, ref).sum(), ref)  # token by token
    assert bool(at_ref.abs().max() < 1e-15) is kind.startswith("u")


def test_sdpg_s3_the_log_ratio_itself_as_a_loss_has_no_expected_gradient() -> None:
    torch.manual_seed(0)
    z, ref = torch.randn(V, dtype=torch.float64), distributions(V)
    p = z.softmax(-1)
    assert gradient(lambda x: (p * (x.log_softmax(-1) - ref)).sum(), z).abs().max() < 1e-15


def test_sdpg_s5_the_published_schedule_is_a_triangle() -> None:
    beta = [trapezoid(1.0, k, 50, 350, 400) for k in range(401)]
    wanted = {0: 0, 1: 0.02, 25: 0.5, 50: 1, 51: 349 / 350, 200: 200 / 350, 399: 1 / 350, 400: 0}
    assert {k: beta[k] for k in wanted} == pytest.approx(wanted) and max(beta) == beta[50]
    assert sum(beta[:400]) / 400 == pytest.approx(0.5) and trapezoid(1.0, 500, 50, 350, 400) == 0
    assert trapezoid(0.3, 0, 0, 0, 400) == 0.3
    batch, logits = make_case(step=25)
    assert objective("sdpg", batch, logits).credit["beta"].unique().tolist() == pytest.approx([5e-4])
    short = objective("sdpg", batch, logits, steps=100).credit["beta"]  # rise and fall overlap: a lower peak
    assert short.unique().tolist() == pytest.approx([1e-3 * (25 / 50) * (75 / 350)])


@pytest.mark.parametrize("silent", [{"beta": 0.0}, {"beta_warmup": 50, "step": 0}], ids=str)
def test_sdpg_without_a_teachers_term_is_grpo_also_where_the_teacher_bans_a_token(silent: dict[str, Any]) -> None:
    """0 times an infinite divergence is NaN, unless nobody takes it."""
    batch, logits = make_case(step=silent.get("step", 60))
    teacher = logits["teacher"].clone()
    teacher[:, 0] = -torch.inf
    fields = {name: value for name, value in silent.items() if name != "step"}
    out = objective("sdpg", batch, {**logits, "teacher": teacher}, alpha=0.0, **fields)
    assert close(out.token_loss, objective("grpo", batch, logits, eps_low=None, eps_high=None).token_loss)


def test_sdpg_s6_the_floor_of_kl_of_student_to_teachers_is_not_the_mutual_information() -> None:
    torch.manual_seed(0)
    weight, teachers = distributions(4).exp()[:, None], distributions(4, V)
    geometric = (weight * teachers).sum(0)
    floor = -geometric.logsumexp(0)
    best = geometric.log_softmax(-1)
    assert close((weight[:, 0] * kl(best.expand(4, V), teachers)).sum(), floor)
    information = (weight[:, 0] * kl(teachers, (weight * teachers.exp()).sum(0).log().expand(4, V))).sum()
    assert abs(float(floor - information)) > 1e-3


def test_sdpgs_gate_opens_on_praise_with_a_privilege_and_off_stop_tokens_and_changes_no_denominator() -> None:
    batch, logits = make_case()
    ends = torch.cat([batch.sequence_ids[1:] != batch.sequence_ids[:-1], torch.tensor([True])])
    batch = replace(batch, terminal=ends, privileged=torch.tensor([True, True, True, True, False, True]))
    out = objective("sdpg", batch, logits)
    wanted = (out.credit["advantage"] > 0) & (batch.sequence_ids != 4)
    assert torch.equal(out.credit["gate"] > 0, wanted) and out.credit["counted"].all()
    shut = objective("sdpg", batch, logits, exclude_terminal=True, gate="all").credit["gate"] > 0
    assert torch.equal(shut, (batch.sequence_ids != 4) & ~ends)
    found = objective("sdpg", batch, logits, beta=0.5, alpha=0.0).token_loss + out.credit["advantage"]
    assert ((found != 0) == wanted).all()
    part = kl(logits["student"].log_softmax(-1), logits["teacher"].log_softmax(-1))
    assert close(found[wanted], 0.5 * 7 / 50 * part[wanted])


# --- DemoPSD (arXiv 2607.02502) ---------------------------------------------------------------------------------------


@SEEDS
def test_demopsd_t1_the_gradient_is_a_blend_of_two_kls_and_the_targets_deviation_shrinks(seed: int) -> None:
    torch.manual_seed(seed)
    z, t, r = torch.randn(V, dtype=torch.float64), distributions(1, V), distributions(1, V)
    a = torch.tensor([0.37], dtype=torch.float64)
    b = barycenter(t, r, a)
    found = gradient(lambda x: kl(x.log_softmax(-1), b).sum(), z)
    blend = gradient(lambda x: ((1 - a) * kl(x.log_softmax(-1), t) + a * kl(x.log_softmax(-1), r)).sum(), z)
    assert close(found, blend)
    delta, off = (t - r)[0], (b - r)[0]
    log_z = ((1 - a) * t + a * r)[0].logsumexp(0)
    assert close(off, (1 - a) * delta - log_z) and log_z < 0
    assert close(off - off.mean(), (1 - a) * (delta - delta.mean()))
    assert abs(float((off**2).sum() / ((1 - a) ** 2 * (delta**2).sum())) - 1) > 1e-3  # uncentred it does not hold


def test_demopsd_t2_the_target_is_between_teacher_and_reference_in_entropy_only_under_its_condition() -> None:
    torch.manual_seed(0)
    n = 2000
    z, sharper = torch.randn(n, V, dtype=torch.float64), 0.5 + 2 * torch.rand(n, 1, dtype=torch.float64)
    r, t = z.log_softmax(-1), (sharper * z + 0.5 * torch.randn(n, V, dtype=torch.float64)).log_softmax(-1)
    delta = t - r

    def entropy(logp: Tensor) -> Tensor:
        return -(logp.exp() * logp).sum(-1)

    holds = torch.ones(n, dtype=torch.bool)
    entropies = []
    for step in range(21):
        q = barycenter(t, r, torch.full((n,), step / 20, dtype=torch.float64))
        p = q.exp()
        mean = (p * delta).sum(-1, keepdim=True)
        holds &= (p * (delta - mean) * r).sum(-1) >= 0
        entropies.append(entropy(q))
    path = torch.stack(entropies)
    rises = path.diff(dim=0)
    assert 50 < holds.sum() < n - 50 and (rises[:, holds] > -1e-12).all()
    assert (entropy(t)[holds] < path[3, holds]).all() and (path[3, holds] < entropy(r)[holds]).all()
    at_published = path[3] - entropy(t)  # alpha 0.15
    assert (at_published[~holds] < 0).float().mean() > 0.1


@pytest.mark.parametrize(("beta", "d", "alpha"), [(15, 0.002, 0.0022), (25, 0.046, 0.0779), (50, 0.01, 0.0367),
                                                  (70, 0.1, 0.1497), (100, 0.026, 0.1293)])
def test_demopsds_blend_is_its_tabled_function_of_the_disagreement(beta: float, d: float, alpha: float) -> None:
    low, high = 0.0, 20.0  # the distance of two coins whose js is d
    for _ in range(80):
        middle = (low + high) / 2
        pair = [torch.tensor([[x, 0.0]], dtype=torch.float64) for x in (middle / 2, -middle / 2)]
        low, high = (middle, high) if js(*(x.log_softmax(-1) for x in pair)) < d else (low, middle)
    logits = {"student": torch.zeros(1, 2, dtype=torch.float64), "teacher": pair[0], "reference": pair[1]}
    out = objective("demopsd", TokenBatch(torch.tensor([0]), torch.tensor([0])), logits, beta=beta)
    assert float(out.metrics["disagreement"]) == pytest.approx(d, rel=1e-9)
    assert float(out.metrics["alpha"]) == pytest.approx(alpha, abs=6e-5)
    assert float(out.metrics["alpha"]) == pytest.approx((1 / (1 + math.exp(-beta * d)) - 0.5) * 2 * 0.15, rel=1e-9)


def test_demopsds_floor_bounds_what_a_token_that_the_teacher_excludes_can_cost() -> None:
    logits = {"student": torch.zeros(1, 2, dtype=torch.float64), "reference": torch.zeros(1, 2, dtype=torch.float64),
              "teacher": torch.tensor([[0.0, -100.0]], dtype=torch.float64)}
    batch = TokenBatch(torch.tensor([0]), torch.tensor([0]))
    cost = {floor: float(objective("demopsd", batch, logits, floor=floor, alpha_max=0.0).loss) for floor in (1e-8, 0.0)}
    b = [1 / (1 + 1e-8), 1e-8 / (1 + 1e-8)]
    assert cost[1e-8] == pytest.approx(sum(0.5 * math.log(0.5 / x) for x in b), rel=1e-12) and cost[0.0] > 49


# --- DOPD (arXiv 2606.30626) ------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("trim", [0.0, 0.05, 0.4])
def test_dopds_routes_and_losses_token_by_token_in_plain_floats(trim: float, seed: int) -> None:
    batch, logits = make_case(seed)
    batch = replace(batch, mask=torch.rand(len(batch.tokens)) > 0.2,
                    privileged=torch.tensor([True, True, False, True, True, True]))
    out = objective("dopd", batch, logits, trim=trim, top_k=4)
    logp = {view: value.log_softmax(-1) for view, value in logits.items()}
    at = {view: [float(row[y]) for row, y in zip(value, batch.tokens.tolist(), strict=True)]
          for view, value in logp.items()}
    counted = [n for n, c in enumerate((batch.mask & (batch.sequence_ids != 2)).tolist()) if c]
    pairs = list(zip(at["teacher"], at["privileged_student"], strict=True))
    gap, sure = [abs(t - p) for t, p in pairs], [math.exp(t) + math.exp(p) for t, p in pairs]
    ordered = sorted(gap[n] for n in counted)
    place = (1 - trim) * (len(ordered) - 1)
    low = math.floor(place + 1e-9)
    bound = ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    kept = [g for g in ordered if g <= bound + 1e-12]
    mean_gap, mean_sure = sum(kept) / len(kept), sum(sure[n] for n in counted) / len(counted)
    assert torch.equal(out.credit["counted"].nonzero().squeeze(1), torch.tensor(counted))
    for n in counted:
        t, p = pairs[n]
        route = (0 if sure[n] >= mean_sure else 1) if gap[n] < mean_gap else 2 if t >= p else 3
        s, theirs = logp["student"][n], logp["teacher" if route in (0, 2) else "privileged_student"][n]
        if route == 2:
            m = ((s.exp() + theirs.exp()) / 2).log()
            loss = (kl(s, m) + kl(theirs, m)) / 2
        else:
            top = s.topk(4).indices
            own, other = (torch.cat([x.exp()[top], 1 - x.exp()[top].sum(0, keepdim=True)]) for x in (s, theirs))
            loss = (0.6, 0.3, None, 0.6)[route] * (own * (own / other).log()).sum()
        assert int(out.credit["route"][n]) == route
        assert float(out.token_loss[n]) == pytest.approx(float(loss), rel=1e-9)


def test_dopd_without_privilege_silently_turns_off_the_routes_to_the_privileged_student() -> None:
    batch, logits = make_case()
    case = (batch, {**logits, "privileged_student": logits["student"]})
    student = logits["student"].clone().requires_grad_()
    out = objective("dopd", batch, {**case[1], "student": student})
    out.loss.backward()
    own = (out.credit["route"] == 1) | (out.credit["route"] == 3)
    assert own.any() and (~own).any()
    assert out.token_loss[own].abs().max() < 1e-15 and student.grad[own].abs().max() < 1e-15
    assert (student.grad[~own].abs().amax(-1) > 1e-4).all()


def test_dopd_routes_on_the_privileged_student_and_not_on_the_deployed_one() -> None:
    sharp = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    logits = {"student": sharp, "teacher": sharp, "privileged_student": torch.zeros(2, 3, dtype=torch.float64)}
    batch = TokenBatch(torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert int(objective("dopd", batch, logits).credit["route"][0]) == 2  # teacher and deployed student are one


def test_dopds_gap_route_to_the_teacher_is_rare_when_the_privileged_student_writes() -> None:
    torch.manual_seed(0)
    t, p = distributions(400, V), distributions(400, V)
    n = t.numel()  # every token of every position, weighed below by the probability that P writes it
    route = routes(t.flatten(), p.flatten(), torch.ones(n, dtype=torch.bool), 0.0)
    gap = (t - p).abs().flatten()
    high = route >= 2
    assert torch.equal(high, gap >= gap.mean())
    assert torch.equal(route == 2, (t - p).flatten() >= gap.mean())  # only the signed gap is needed
    share = (p.exp().flatten() * (route == 2)).sum() / 400
    assert share <= math.exp(-float(gap.mean()))


def test_dopds_full_route_is_locally_its_weakest() -> None:
    torch.manual_seed(0)
    z = torch.randn(V, dtype=torch.float64)
    near = (z + 1e-3 * torch.randn(V, dtype=torch.float64)).log_softmax(-1)
    by_js, by_kl = (gradient(lambda x, f=f: f(x.log_softmax(-1), near), z).norm() for f in (js, kl))
    assert float(by_js / by_kl) == pytest.approx(0.25, abs=1e-3) and by_js < 0.3 * by_kl


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_sdpo_and_demopsd_cap_the_detached_ratio() -> None:
    batch, logits = make_case(old=True)
    logp = logits["student"].log_softmax(-1).gather(1, batch.tokens[:, None]).squeeze(1)
    rho = (logp - batch.logp_old).exp()
    on_policy = replace(batch, logp_old=None)
    assert (rho > 1.2).any() and (rho < 0.9).any()
    for name in ("sdpo", "demopsd"):
        plain = objective(name, on_policy, logits).token_loss
        assert close(objective(name, batch, logits, is_cap=1.2).token_loss, plain * rho.clamp(max=1.2))
        assert close(objective(name, batch, logits, is_cap=None).token_loss, plain * rho)
    found = clipped_loss(logp, batch.logp_old, torch.ones_like(logp), **PLAIN).loss
    assert close(found, -rho)


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opd", "gkd", "dopd"])
def test_the_trainer_refuses_an_external_view_without_a_teacher_and_takes_the_same_method_with_another(
    name: str,
) -> None:
    recipe = {"model": "quickstart", "data": {"source": "gym:basic_arithmetic"}, "reward": "gym",
              "privilege": {"kind": "answer"}}
    with pytest.raises(UserError, match=rf"'{name}': its view 'teacher' is another model, .*`teacher` names none"):
        make_run({**recipe, "method": name})
    run = make_run({**recipe, "method": {"name": name, "teacher": {"weights": "initial"}}})
    assert run.method.build().views["teacher"].weights == "initial"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("name", sorted({*names()} - {"grpo", "rlsd", "opsd"}))
def test_every_method_trains(name: str, home: Path) -> None:
    external = any(view.weights == "external" for view in build(name).views.values())
    fields: dict[str, Any] = {"teacher": {"weights": "initial"}} if external else {}
    if name == "sdft":
        fields["skip"] = 0
    recipe = recipe_of(home, out=str(home / name), method={"name": name, **fields}, optim={"steps": 2})
    run = selftaught.train(recipe, console=Console(quiet=True))
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    done = [row for row in rows if "loss" in row]
    assert len(done) == 2 and all(math.isfinite(row["loss"]) and not row["skipped"] for row in done)
