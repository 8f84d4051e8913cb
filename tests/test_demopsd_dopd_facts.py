"""What is true of DemoPSD (arXiv 2607.02502) and DOPD (arXiv 2606.30626) at their limits (see `test_method_facts`)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selftaught.credit import STUDENT_LIGHT, STUDENT_WEAK, TEACHER_FULL, TEACHER_LIGHT, routes
from selftaught.loss import js, kl, with_tail
from selftaught.methods import build, objective
from selftaught.vocabulary import TokenDist
from tabular import V, close, distributions, gradient, make_case, outcome

SEEDS = pytest.mark.parametrize("seed", range(3))
FULL: dict[str, Any] = {"top_k": None, "floor": 0.0}  # of DemoPSD: on the whole vocabulary, as it is


# --- DemoPSD ----------------------------------------------------------------------------------------------------------


@SEEDS
def test_demopsd_t1_the_gate_lowers_the_leakage_wherever_it_opens_and_only_there(seed: int) -> None:
    """E[(1 - a)^2 |delta|^2] < E[|delta|^2], with equality where T = R (nothing to leak) and where beta = 0."""
    batch, logits = make_case(seed)
    t, r = (logits[view].log_softmax(-1) for view in ("teacher", "reference"))
    size = (t - r).square().sum(-1)

    def left(views: dict[str, Tensor], **fields: Any) -> Tensor:
        alpha = objective("demopsd", batch, views, **FULL, **fields).metrics["alpha"]
        return (1 - alpha) ** 2 * size

    gated = left(logits)
    assert (gated < size).all() and 0.85**2 - 1e-12 < gated.mean() / size.mean() < 0.8
    assert torch.equal(left(logits, beta=0.0), size)
    half = torch.arange(len(size)) % 2 == 0
    logits["teacher"] = torch.where(half[:, None], logits["reference"], logits["teacher"])
    alpha = objective("demopsd", batch, logits, **FULL).metrics["alpha"]
    assert alpha[half].abs().max() < 1e-14 and alpha[~half].min() > 0.1
    # There the target is the teacher, so that the pull is that of KL(S||T), up to the target's normaliser.
    pull = outcome("sdpo", (batch, logits), divergence="kl_student_teacher", top_k=None)[1]
    found = outcome("demopsd", (batch, logits), **FULL)[1]
    assert close(found[half], pull[half]) and not close(found[~half], pull[~half], 1e-4)


def test_demopsds_target_tends_to_the_teacher_as_the_disagreement_vanishes() -> None:
    """d falls with the square of the distance of T and R, and B - T with a times that distance: with its cube."""
    batch, logits = make_case()
    off = torch.randn_like(logits["teacher"])
    gaps, disagreements = [], []
    for distance in (0.1, 0.01):
        views = {**logits, "teacher": logits["reference"] + distance * off}
        found = outcome("demopsd", (batch, views), **FULL)[1]
        pull = outcome("sdpo", (batch, views), divergence="kl_student_teacher", top_k=None)[1]
        gaps.append(float((found - pull).norm()))
        disagreements.append(float(objective("demopsd", batch, views, **FULL).metrics["disagreement"].mean()))
    assert disagreements[0] / disagreements[1] == pytest.approx(100, rel=0.05)
    assert gaps[0] / gaps[1] == pytest.approx(1000, rel=0.1) and gaps[1] > 1e-9


@SEEDS
@pytest.mark.parametrize("alpha_max", [0.15, 0.6, 1.0])
def test_demopsds_target_tends_to_the_geometric_mean_at_alpha_max_as_beta_grows(alpha_max: float, seed: int) -> None:
    batch, logits = make_case(seed)
    t, r, s = (logits[view].log_softmax(-1) for view in ("teacher", "reference", "student"))
    limit = kl(s, ((1 - alpha_max) * t + alpha_max * r).log_softmax(-1))
    far = [float((objective("demopsd", batch, logits, beta=beta, alpha_max=alpha_max, **FULL).token_loss
                  - limit).abs().max()) for beta in (1.0, 10.0, 100.0, 1e6)]
    assert far == sorted(far, reverse=True) and far[0] > 1e-2 and far[-1] < 1e-12


@SEEDS
@pytest.mark.parametrize("top_k", [None, 4])
def test_demopsds_blend_does_not_depend_on_how_the_vocabulary_is_numbered(top_k: int | None, seed: int) -> None:
    batch, logits = make_case(seed)
    order = torch.randperm(V)
    renumbered = replace(batch, tokens=torch.argsort(order)[batch.tokens])
    moved = {view: value[:, order] for view, value in logits.items()}
    before, after = (objective("demopsd", b, views, top_k=top_k, beta=3.0)
                     for b, views in ((batch, logits), (renumbered, moved)))
    for name in ("alpha", "disagreement"):
        assert close(before.metrics[name], after.metrics[name], 1e-14) and before.metrics[name].std() > 1e-2
    assert close(before.token_loss, after.token_loss)
    there, back = (outcome("demopsd", case, top_k=top_k)[1] for case in ((batch, logits), (renumbered, moved)))
    assert close(there[:, order], back)


# --- DOPD -------------------------------------------------------------------------------------------------------------


def pairs(skewed: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of 20,000 sampled tokens under both privileged models: their gaps have a long upper or lower tail."""
    torch.manual_seed(0)
    n = 20_000
    gap = 0.6 * torch.randn(n, dtype=torch.float64).exp()
    gap = gap if skewed else (2 - gap).clamp(min=0)
    sign = torch.where(torch.rand(n) < 0.5, 1.0, -1.0)
    middle = -3 + torch.randn(n, dtype=torch.float64)
    return middle + sign * gap / 2, middle - sign * gap / 2


def test_with_skewed_gaps_fewer_than_half_the_tokens_are_far_apart_and_trimming_takes_in_more() -> None:
    t, p = pairs(skewed=True)
    gap, counted = (t - p).abs(), torch.ones(len(t), dtype=torch.bool)
    plain, trimmed = (routes(t, p, counted, trim) for trim in (0.0, 0.05))
    mean, lower = gap.mean(), gap[gap <= gap.quantile(0.95)].mean()
    assert gap.median() < lower < 0.9 * mean
    assert torch.equal(plain >= TEACHER_FULL, gap >= mean) and torch.equal(trimmed >= TEACHER_FULL, gap >= lower)
    assert 0.2 < (plain >= TEACHER_FULL).double().mean() < (trimmed >= TEACHER_FULL).double().mean() < 0.5
    for route in (TEACHER_FULL, STUDENT_LIGHT):
        assert (plain == route).sum() < (trimmed == route).sum() and ((plain != route) | (trimmed == route)).all()
    t, p = pairs(skewed=False)  # a tail of small gaps: it is the skew that makes them few
    assert (routes(t, p, counted, 0.0) >= TEACHER_FULL).double().mean() > 0.5


def test_the_logit_gradient_of_js_is_bounded_and_that_of_kl_of_student_to_teacher_is_not() -> None:
    z = torch.zeros(2, dtype=torch.float64)
    for far in (10.0, 100.0, 1000.0):
        teacher = torch.tensor([0.0, -far], dtype=torch.float64).log_softmax(-1)
        by_kl = gradient(lambda x, t=teacher: kl(x.log_softmax(-1), t), z)
        assert by_kl.tolist() == pytest.approx([-far / 4, far / 4], rel=1e-12)
        by_js = gradient(lambda x, t=teacher: js(x.log_softmax(-1), t), z)
        middle = torch.tensor([0.75, 0.25]).double()  # M, once the teacher excludes the second token
        wanted = 0.25 * (math.log(2) - float((0.5 * (0.5 / middle).log()).sum()))
        assert by_js.tolist() == pytest.approx([-wanted, wanted], rel=1e-3)
    torch.manual_seed(0)
    for std in (1.0, 10.0, 100.0):
        z, teacher = 3 * torch.randn(300, V, dtype=torch.float64), distributions(300, V, std=std)
        by_js, by_kl = (gradient(lambda x, f=f, t=teacher: f(x.log_softmax(-1), t).sum(), z).abs().sum(-1).max()
                        for f in (js, kl))
        # |g| <= (sum S |log S/M| + KL(S||M)) / 2, where KL <= ln 2, and S log(M/S) <= M / e where M > S.
        assert by_js <= math.log(2) + 1 / math.e
    assert by_kl > 20


@pytest.mark.parametrize("k", [1, 3])
def test_raw_sums_over_top_k_tokens_are_seldom_negative_on_the_students_and_often_on_the_teachers(k: int) -> None:
    """Without a bucket for the rest neither is a divergence: a teacher surer of the student's token is below 0."""
    torch.manual_seed(0)
    s, t = distributions(5000, 40), distributions(5000, 40)
    terms = s.exp() * (s - t)
    on_student, on_teacher = (terms.gather(1, x.topk(k).indices).sum(-1) for x in (s, t))
    assert (on_student < 0).double().mean() < 0.05 and (on_teacher < 0).double().mean() > 0.8
    s, t = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.4, 0.3, 0.3], [0.9, 0.05, 0.05]))
    raw = float((s.exp() * (s - t))[0, 0])
    assert raw == pytest.approx(0.4 * math.log(4 / 9)) and kl(*with_tail(1, s, t)) > 0.5


def test_dopds_routes_curve_by_0_30_0_15_and_0_125_per_unit_of_chi_square_near_agreement() -> None:
    torch.manual_seed(0)
    s = distributions(1, V)
    near = (s + 1e-4 * torch.randn(1, V, dtype=torch.float64)).log_softmax(-1)
    chi_square = float(((near.exp() - s.exp()) ** 2 / s.exp()).sum())
    token = torch.tensor([0])
    views = {view: TokenDist(near, token) for view in ("teacher", "privileged_student")}
    method, sampled = build("dopd", top_k=None), near[:, 0]
    curvature = {route: float(method.loss(TokenDist(s, token), views, {"route": torch.tensor([route]),
                                                                       "teacher": sampled}).loss) / chi_square
                 for route in (TEACHER_LIGHT, STUDENT_WEAK, TEACHER_FULL, STUDENT_LIGHT)}
    assert curvature == pytest.approx({0: 0.30, 1: 0.15, 2: 0.125, 3: 0.30}, rel=1e-3)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_the_teachers_ratio_is_one_on_average_over_what_the_privileged_student_writes(spread: float) -> None:
    """E_{y~P}[T(y) / P(y)] = 1, so by Markov P(log T - log P >= a) <= exp(-a): route 2 is rare, route 3 need not be."""
    torch.manual_seed(1)
    student = torch.randn(64, 32, dtype=torch.float64).log_softmax(-1)
    teacher = (student + spread * torch.randn(64, 32, dtype=torch.float64)).log_softmax(-1)
    gap, weight = teacher - student, student.exp()
    assert close((weight * gap.exp()).sum(-1), torch.ones(64, dtype=torch.float64))
    for a in (0.1, 0.5, 1.0, 3.0):
        assert ((weight * (gap >= a)).sum(-1) <= math.exp(-a)).all()
    below = (weight * (gap <= -1.0)).sum(-1)
    assert spread < 1 or (below > math.exp(-1.0)).any()  # nothing bounds the other side


def test_one_network_as_both_privileged_models_sends_every_token_to_the_full_teacher() -> None:
    batch, logits = make_case()
    alone = {**logits, "privileged_student": logits["teacher"]}
    out = objective("dopd", batch, alone)
    assert (out.credit["route"] == TEACHER_FULL).all()  # equal gaps reach their mean, equal probabilities the teacher
    assert close(out.token_loss, js(logits["teacher"].log_softmax(-1), logits["student"].log_softmax(-1)))
    assert len(objective("dopd", batch, logits).credit["route"].unique()) == 4
