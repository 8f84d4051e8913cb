"""What is true of RLSD (arXiv 2604.03128) and of OPSD's clip (arXiv 2601.18734), on small tables of probabilities.

Expectations are sums over the whole vocabulary, never samples. Where the paper's own statement does not hold, a
test holds what does, and shows the paper's version failing.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from selftaught.credit import evidence, evidence_weight, linear_decay
from selftaught.loss import clipped_loss, kl
from selftaught.methods import build, objective
from selftaught.records import TokenBatch
from tabular import LENGTHS, close, distributions, gradient, make_case, outcome
from tabular import V as WIDTH

SEEDS = pytest.mark.parametrize("seed", range(5))
V, R = 6, 4



# --- T1 and T2: what distilling from many privileged teachers asks of one student -------------------------------------


@SEEDS
def test_t1_kl_from_teachers_to_student_is_kl_from_their_mean_plus_mutual_information(seed: int) -> None:
    torch.manual_seed(seed)
    weight, teachers, student = distributions(R).exp(), distributions(R, V), distributions(V)
    mean = (weight[:, None] * teachers.exp()).sum(0).log()
    information = (weight * kl(teachers, mean.expand(R, V))).sum()
    total = (weight * kl(teachers, student.expand(R, V))).sum()
    assert close(total, kl(mean, student) + information)
    assert information > 1e-3 and total > information  # a floor that no student gets below


@SEEDS
def test_t1_does_not_hold_for_kl_from_student_to_teachers_whose_floor_is_at_the_geometric_mean(seed: int) -> None:
    torch.manual_seed(seed)
    weight, teachers, student = distributions(R).exp(), distributions(R, V), distributions(V)
    mean = (weight[:, None] * teachers.exp()).sum(0).log()
    information = (weight * kl(teachers, mean.expand(R, V))).sum()
    total = (weight * kl(student.expand(R, V), teachers)).sum()
    assert not close(total, kl(student, mean) + information, 1e-3)
    geometric = (weight[:, None] * teachers).sum(0)
    log_z = geometric.logsumexp(0)
    assert close(total, kl(student, geometric - log_z) - log_z)


def gradients_by_teacher(seed: int, parameters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight_R, teachers_RV, and in the student's parameters the gradients of KL(T_r||S) (R, P) and log S (V, P)."""
    torch.manual_seed(seed)
    weight, teachers = distributions(R).exp(), distributions(R, V)
    into_logits = torch.eye(V, dtype=torch.float64)
    if parameters != V:
        into_logits = torch.randn(V, parameters, dtype=torch.float64)
    theta = torch.randn(parameters, dtype=torch.float64)

    def log_s(theta: Tensor) -> Tensor:
        return (into_logits @ theta).log_softmax(-1)

    by_teacher = torch.stack([gradient(lambda theta, t=teacher: kl(t, log_s(theta)), theta) for teacher in teachers])
    return weight, teachers, by_teacher, jacobian(log_s, theta)


@SEEDS
def test_t2_the_mean_gradient_is_that_of_the_mean_teacher(seed: int) -> None:
    weight, teachers, by_teacher, score = gradients_by_teacher(seed, 3)
    mean = (weight[:, None] * teachers.exp()).sum(0)
    ideal = -(mean[:, None] * score).sum(0)
    assert close((weight[:, None] * by_teacher).sum(0), ideal)
    assert (by_teacher - ideal).abs().max() > 1e-2  # one teacher's gradient alone is another


@SEEDS
@pytest.mark.parametrize("parameters", [3, V])
def test_t2_the_spread_of_the_gradient_needs_the_covariances_that_the_paper_leaves_out(seed: int,
                                                                                      parameters: int) -> None:
    weight, teachers, by_teacher, score = gradients_by_teacher(seed, parameters)
    off = teachers.exp() - (weight[:, None] * teachers.exp()).sum(0)
    covariance = torch.einsum("r,ru,rv->uv", weight, off, off)
    deviation = by_teacher - (weight[:, None] * by_teacher).sum(0)
    spread = (weight * (deviation**2).sum(1)).sum()
    inner = score @ score.t()
    assert close(spread, (covariance * inner).sum())
    papers = (covariance.diagonal() * inner.diagonal()).sum()
    assert abs(papers / spread - 1) > 0.02
    if parameters == V:  # in the logits themselves it is the sum of the variances
        assert close(spread, covariance.diagonal().sum())


# --- T4: evidence in a world with one consistent joint ----------------------------------------------------------------


@SEEDS
def test_t4_evidence_is_how_much_a_token_raises_the_probability_of_the_privilege(seed: int) -> None:
    torch.manual_seed(seed)
    joint = distributions(R * 3 * 3 * 3).exp().reshape(R, 3, 3, 3)  # P(r, y1, y2, y3)
    for r, *y in itertools.product(range(R), range(3), range(3), range(3)):
        product, before = 1.0, joint[r].sum() / joint.sum()
        prior = before
        for t in range(3):
            known = joint[:, *y[:t]].reshape(R, 3, -1).sum(-1)  # P(r, y_<t, y_t)
            teacher, student = known[r] / known[r].sum(), known.sum(0) / known.sum()
            after = known[r, y[t]] / known[:, y[t]].sum()  # P(r | y_<=t)
            ratio = evidence(teacher.log(), student.log())[y[t]].exp()
            assert close(ratio, after / before)
            product, before = product * ratio, after
        assert close(product, joint[r, *y] / joint[:, *y].sum() / prior)


# --- T7, T8, T9: what the weighted update is in expectation -----------------------------------------------------------


def expected_gradient(logits: Tensor, advantage: Tensor) -> Tensor:
    """-E_{a ~ S} of the gradient of the package's surrogate on token a with `advantage` (V,), in the logits: (V,)."""
    student = logits.detach().log_softmax(-1)

    def loss(z: Tensor) -> Tensor:
        per_token = clipped_loss(z.log_softmax(-1), None, advantage, eps_low=None, eps_high=None).loss
        return (student.exp() * per_token).sum()

    return -gradient(loss, logits)


@SEEDS
def test_t7_one_template_holds_both_the_policy_gradient_and_kl_of_student_to_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    logits, teacher = torch.randn(V, dtype=torch.float64), distributions(V)
    student = logits.log_softmax(-1)
    reward = torch.randn(V, dtype=torch.float64)
    policy_gradient = gradient(lambda z: (z.softmax(-1) * reward).sum(), logits)
    assert close(expected_gradient(logits, reward), policy_gradient)
    distillation = gradient(lambda z: kl(z.log_softmax(-1), teacher), logits)
    assert close(expected_gradient(logits, evidence(teacher, student)), -distillation)


@SEEDS
def test_t8_unclipped_weights_have_mean_1_for_praise_and_more_than_1_for_blame(seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = distributions(V), distributions(V)
    d = evidence(teacher, student)
    praise, blame = (evidence_weight(d, torch.full_like(d, a), math.inf) for a in (2.0, -0.5))
    chi_square = (student.exp() ** 2 / teacher.exp()).sum() - 1
    assert close((student.exp() * praise).sum(), torch.ones((), dtype=torch.float64))
    assert close((student.exp() * blame).sum(), 1 + chi_square) and chi_square > 0.05
    clipped = [(student.exp() * evidence_weight(d, torch.full_like(d, a), 0.2)).sum() for a in (2.0, -0.5)]
    assert abs(clipped[0] - 1) > 1e-3 and abs(clipped[1] - 1 - chi_square) > 1e-2  # the clip keeps neither


@SEEDS
def test_t9_praise_is_expected_kl_of_teacher_to_student(seed: int) -> None:
    """So the teacher does enter the expected direction, and not the size of the update alone."""
    torch.manual_seed(seed)
    logits, teacher = torch.randn(V, dtype=torch.float64), distributions(V)
    d = evidence(teacher, logits.log_softmax(-1))
    advantage = torch.full_like(d, 1.7)
    distillation = gradient(lambda z: kl(teacher, z.log_softmax(-1)), logits)
    assert close(expected_gradient(logits, advantage * evidence_weight(d, advantage, math.inf)), -1.7 * distillation)


@SEEDS
def test_t9_holds_for_the_method_itself_while_the_clip_does_not_bind(seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(V, dtype=torch.float64)
    teacher = (logits + 0.2 * torch.randn(V, dtype=torch.float64)).log_softmax(-1)
    rows = logits.expand(2 * V, V).clone().requires_grad_()  # each token once in a right and once in a wrong rollout
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat_interleave(V)
    batch = TokenBatch(torch.arange(V).repeat(2), torch.arange(2 * V), reward, torch.zeros(2 * V, dtype=torch.int64))
    out = objective("rlsd", batch, {"student": rows, "teacher": teacher.expand(2 * V, V)}, lam=1.0, eps_w=0.9,
                    lam_decay=None)
    (out.token_loss[:V] * logits.softmax(-1)).sum().backward()
    advantage = 0.5 / (math.sqrt(2 * V * 0.25 / (2 * V - 1)) + 1e-6)
    assert close(rows.grad.sum(0), advantage * gradient(lambda z: kl(teacher, z.log_softmax(-1)), logits))


def credit_of(advantage_sign: float, d: Tensor, **fields: float | int | None) -> tuple[Tensor, Tensor, float]:
    """RLSD's reweighted advantages and weights at evidence d, and |A|, of a rollout that was right (+1) or wrong."""
    zero = torch.zeros_like(d)
    n = len(d)
    reward = torch.tensor([advantage_sign, 0.0], dtype=torch.float64)
    batch = TokenBatch(torch.zeros(2 * n, dtype=torch.int64), torch.arange(2).repeat_interleave(n), reward,
                       torch.zeros(2, dtype=torch.int64))
    credit = build("rlsd", **fields).credit(batch, {"teacher": torch.cat([d, d]), "student": torch.cat([zero, zero])})
    return credit["advantage"][:n], credit["weight"][:n], 0.5 / (math.sqrt(0.5) + 1e-6)


GRID = torch.linspace(-30, 30, 2401, dtype=torch.float64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("lam", "eps_w"), [(0.5, 0.2), (1.0, 0.2), (1.0, 0.99), (0.1, 0.5)])
def test_t9_the_increment_over_grpo_has_the_sign_of_the_evidence_and_grows_with_it(sign: float, lam: float,
                                                                                   eps_w: float) -> None:
    advantage, _, size = credit_of(sign, GRID, lam=lam, eps_w=eps_w, lam_decay=None)
    increment = advantage - sign * size
    inner = GRID.abs() > 1e-9
    assert torch.equal(torch.sign(increment[inner]), torch.sign(GRID[inner])) and increment[~inner].abs().max() < 1e-12
    assert (increment.diff() >= -1e-15).all()
    near = torch.tensor([-1e-5, 1e-5], dtype=torch.float64)
    first_order = credit_of(sign, near, lam=lam, eps_w=eps_w, lam_decay=None)[0] - sign * size
    torch.testing.assert_close(first_order, lam * size * near, rtol=2e-5, atol=0)


# --- T5, bounds, schedule, equations 15 and 16 ------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("lam", "eps_w"), [(0.5, 0.2), (1.0, 0.2), (1.0, 0.99), (0.1, 0.5)])
def test_t5_the_teacher_never_turns_an_update_and_moves_it_by_lam_eps_w_at_most(sign: float, lam: float,
                                                                                eps_w: float) -> None:
    advantage, weight, _ = credit_of(sign, GRID, lam=lam, eps_w=eps_w, lam_decay=None)
    assert (torch.sign(advantage) == sign).all()
    assert float(weight.min()) == pytest.approx(1 - lam * eps_w, rel=1e-12)
    assert float(weight.max()) == pytest.approx(1 + lam * eps_w, rel=1e-12)


def test_the_clip_binds_at_the_logarithms_of_its_bounds() -> None:
    d = torch.tensor([math.log(1.2) - 1e-6, math.log(1.2) + 1e-6, math.log(0.8) - 1e-6, math.log(0.8) + 1e-6])
    weight = evidence_weight(d.double(), torch.ones(4, dtype=torch.float64), 0.2)
    assert weight[0] < 1.2 and weight[1] == 1.2 and weight[2] == 0.8 and weight[3] > 0.8


def test_lam_falls_in_a_line_to_zero_and_stays_there() -> None:
    falling = [linear_decay(0.5, k, 50) for k in (0, 1, 49, 50, 51)]
    assert falling == pytest.approx([0.5, 0.49, 0.01, 0.0, 0.0], abs=1e-15)
    assert [linear_decay(0.5, k, decay) for k in (0, 1000) for decay in (0, None)] == [0.5] * 4


@pytest.mark.parametrize(("step", "weight"), [(0, 1.1), (1, 1.098), (49, 1.002), (50, 1.0), (51, 1.0)])
def test_the_weight_follows_the_schedule_by_the_batchs_step(step: int, weight: float) -> None:
    logits = {"student": torch.zeros(2, 2, dtype=torch.float64), "teacher": torch.tensor([[9.0, 0.0]] * 2).double()}
    batch = TokenBatch(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]),
                       torch.zeros(2, dtype=torch.int64), step=step)
    right, wrong = objective("rlsd", batch, logits).credit["weight"].tolist()
    assert right == pytest.approx(weight, rel=1e-12) and wrong == pytest.approx(2 - weight, rel=1e-12)


def equation_16(w: Tensor, advantage: Tensor) -> Tensor:
    """As the paper prints it: min(w A, clip(w, 0.8, 1.2) A), without an importance ratio."""
    return torch.minimum(w * advantage, w.clamp(0.8, 1.2) * advantage)


@pytest.mark.parametrize(
    ("sign", "eq15", "eq16"),
    [(1.0, (0.8, 0.9, 1.1, 1.2), (0.3, 0.9, 1.1, 1.2)), (-1.0, (-0.8, -0.9, -1.1, -1.2), (-0.8, -0.9, -1.1, -5.0))],
)
def test_equation_15_bounds_blame_where_equation_16_as_printed_does_not(sign: float, eq15: tuple[float, ...],
                                                                        eq16: tuple[float, ...]) -> None:
    w = torch.tensor([0.3, 0.9, 1.1, 5.0], dtype=torch.float64)
    advantage, _, size = credit_of(sign, sign * w.log(), lam=1.0, lam_decay=None)
    assert (advantage / size).tolist() == pytest.approx(eq15, rel=1e-12)
    assert equation_16(w, torch.full_like(w, sign)).tolist() == pytest.approx(eq16, rel=1e-12)


def test_equation_16_as_printed_has_no_gradient_and_the_method_has() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, V, dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]),
                       torch.zeros(2, dtype=torch.int64))
    out = objective("rlsd", batch, {"student": logits, "teacher": distributions(2, V)}, lam=1.0)
    assert not any(value.requires_grad for value in out.credit.values())
    printed = equation_16(out.credit["weight"], out.credit["advantage"] / out.credit["weight"])
    assert not printed.requires_grad
    (found,) = torch.autograd.grad(out.loss, logits)
    onehot = torch.nn.functional.one_hot(batch.tokens, V)
    # Through the sampled token alone: what the weight was made of is constant.
    by_hand = -out.credit["advantage"][:, None] * (onehot - logits.softmax(-1)) / 2
    assert close(found, by_hand.detach()) and found.abs().max() > 0.1


# --- OPSD's clip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "loss", "slope"),
    [(0.05, 0.05 + 0.4 * math.log(0.4 / 0.6), (0.16, -0.16)), (None, 0.2 * math.log(1.5), (-0.2, 0.2))],
)
def test_opsds_clip_turns_the_gradient_against_the_teacher_at_a_fork(clip: float | None, loss: float,
                                                                     slope: tuple[float, float]) -> None:
    logits = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    batch = TokenBatch(torch.tensor([0]), torch.tensor([0]))
    out = objective("opsd", batch, {"student": logits, "teacher": teacher}, clip=clip, temperature=1.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert logits.grad.squeeze(0).tolist() == pytest.approx(slope, rel=1e-12)
    if clip is not None:
        assert out.loss.item() == pytest.approx(-0.112, abs=5e-4)


# --- without a privilege, and beside padding --------------------------------------------------------------------------


AS_GRPO = {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("old", [False, True])
def test_without_any_privilege_rlsd_is_grpo_bit_for_bit(old: bool, dtype: torch.dtype) -> None:
    batch, logits = make_case(old=old)
    none = torch.zeros(len(LENGTHS), dtype=torch.bool)
    batch = replace(batch, privileged=none, reward=batch.reward.to(dtype),
                    logp_old=batch.logp_old.to(dtype) if old else None)
    case = batch, {view: value.to(dtype) for view, value in logits.items()}
    left, right = outcome("rlsd", case, lam=1.0), outcome("grpo", case, **AS_GRPO)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)) and right[1].abs().max() > 1e-3
    some = replace(batch, privileged=~none), case[1]
    assert not torch.equal(outcome("rlsd", some, lam=1.0)[1], right[1])


@pytest.mark.parametrize("impossible", [-1e10, -math.inf])
@pytest.mark.parametrize("where", [("teacher",), ("student", "teacher"), ("student",), ("old",), ("teacher", "old")],
                         ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_at_minus_1e10_or_infinity_changes_neither_loss_nor_gradient(dtype: torch.dtype, impossible: float,
                                                                             where: tuple[str, ...]) -> None:
    batch, logits = make_case(old=True)
    batch = replace(batch, reward=batch.reward.to(dtype), logp_old=batch.logp_old.to(dtype))
    logits = {view: value.to(dtype) for view, value in logits.items()}
    n, pad = len(batch.tokens), 4
    rows = torch.zeros(pad, WIDTH, dtype=dtype)
    padded = replace(batch, tokens=torch.cat([batch.tokens, torch.full((pad,), 2)]),
                     sequence_ids=torch.cat([batch.sequence_ids, torch.tensor([0, 1, 2, 5])]),
                     mask=torch.arange(n + pad) < n,
                     logp_old=torch.cat([batch.logp_old, torch.full((pad,), impossible if "old" in where else -1.0)]))
    more = {view: torch.cat([value, rows.index_fill(1, torch.tensor([2]), impossible) if view in where else rows])
            for view, value in logits.items()}
    loss, found = outcome("rlsd", (batch, logits), lam=1.0)
    with_padding, wider = outcome("rlsd", (padded, more), lam=1.0)
    assert close(loss, with_padding, 1e-6 if dtype == torch.float32 else 1e-15)  # one more term in the sum, of 0
    assert torch.equal(found, wider[:n]) and (wider[n:] == 0).all()
    counted = replace(padded, mask=None)  # and where such tokens do count, all is finite
    assert all(torch.isfinite(x).all() for x in outcome("rlsd", (counted, more), lam=1.0))
