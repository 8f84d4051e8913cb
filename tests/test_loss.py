"""Divergences, surrogates, reductions, lazy distributions and the chunked head, each against a formula written out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Categorical, kl_divergence

from selftaught import kernels
from selftaught.kernels import loops
from selftaught.loss import (
    chunked,
    chunked_loss,
    clipped_kl,
    clipped_loss,
    importance_ratio,
    kl,
    masked,
    sampler_correction,
    token_weights,
)
from selftaught.records import Credit, TokenLoss
from selftaught.vocabulary import (
    CHUNK_ELEMENTS,
    FEWEST,
    Head,
    TokenDist,
    as_head,
    chunk_size,
    project,
    sampled_log_probs,
)

INF = math.inf


def normal(*shape: int, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, dtype=torch.float64)


# --- divergences ------------------------------------------------------------------------------------------------------


def test_kl_is_that_of_torch_distributions_in_the_order_of_its_arguments() -> None:
    p, q = normal(9, 5, std=3).log_softmax(-1), normal(9, 5, std=3).log_softmax(-1)
    torch.testing.assert_close(kl(p, q), kl_divergence(Categorical(logits=p), Categorical(logits=q)))
    assert not torch.allclose(kl(p, q), kl(q, p))


def test_kl_and_its_clipped_form_have_the_gradients_of_their_values() -> None:
    p, q = normal(3, 5).requires_grad_(), normal(3, 5).requires_grad_()
    assert gradcheck(lambda p, q: kl(p.log_softmax(-1), q.log_softmax(-1)), (p, q))
    assert gradcheck(lambda p, q: clipped_kl(p.log_softmax(-1), q.log_softmax(-1), 0.05), (p, q))


def test_kl_to_the_student_has_gradient_student_minus_teacher_in_the_logits() -> None:
    logits, teacher = normal(4, 6).requires_grad_(), normal(4, 6).log_softmax(-1)
    kl(teacher, logits.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - teacher.exp()).detach())


def test_kl_of_the_student_has_gradient_student_times_excess_log_ratio() -> None:
    logits, teacher = normal(4, 6).requires_grad_(), normal(4, 6).log_softmax(-1)
    kl(logits.log_softmax(-1), teacher).sum().backward()
    log_s = logits.detach().log_softmax(-1)
    gap = log_s - teacher
    torch.testing.assert_close(logits.grad, log_s.exp() * (gap - (log_s.exp() * gap).sum(-1, keepdim=True)))


def test_tokens_banned_by_both_contribute_nothing_and_banned_by_the_second_alone_infinity() -> None:
    p, q = normal(2, 4), normal(2, 4)
    small = kl(p[:, :3].log_softmax(-1), q[:, :3].log_softmax(-1))
    p[:, 3] = q[:, 3] = -INF
    logits = q.requires_grad_()
    value = kl(p.log_softmax(-1), logits.log_softmax(-1))
    torch.testing.assert_close(value, small)
    value.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and (logits.grad[:, 3] == 0).all()
    assert (kl(normal(2, 4).log_softmax(-1), logits.log_softmax(-1)) == INF).all()


def test_clipped_kl_caps_each_summand_from_above_alone() -> None:
    p, q = torch.tensor([[[0.7, 0.1, 0.2]], [[0.2, 0.6, 0.2]]], dtype=torch.float64).log()
    summands = [0.7 * math.log(0.7 / 0.2), 0.1 * math.log(0.1 / 0.6), 0.0]
    assert clipped_kl(p, q, None).item() == pytest.approx(sum(summands), rel=1e-12)
    assert clipped_kl(p, q, 0.05).item() == pytest.approx(0.05 + summands[1], rel=1e-12)


# --- surrogates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "slope"),  # slope: d loss / d logp, which is -rho A where nothing is clipped
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.56, 0.0),  # praise stops at 1 + eps_high
        (0.5, 2.0, -1.0, -1.0),  # and has no floor
        (1.0, -2.0, 2.0, 2.0),
        (0.5, -2.0, 1.6, 0.0),  # blame stops at 1 - eps_low
        (1.5, -2.0, 3.0, 3.0),  # and is bounded by the dual clip alone
        (2.9, -2.0, 5.8, 5.8),
        (3.5, -2.0, 6.0, 0.0),
        (3.5, 2.0, -2.56, 0.0),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_surrogate_with_dual_clip_by_hand(rho: float, advantage: float, loss: float, slope: float) -> None:
    logp = torch.tensor([math.log(rho) - 1.5], dtype=torch.float64, requires_grad=True)
    out = clipped_loss(logp, torch.tensor([-1.5]).double(), torch.tensor([advantage]).double(), eps_low=0.2,
                       eps_high=0.28, dual_clip=3.0).loss
    out.backward()
    assert logp.grad is not None
    assert (out.item(), logp.grad.item()) == pytest.approx((loss, slope), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "losses"),  # at rho = 0.5, 1.5, 4 with A = 1, then with A = -1
    [
        ({"eps_low": None, "eps_high": None}, [-0.5, -1.5, -4.0, 0.5, 1.5, 4.0]),
        ({"eps_low": 0.2, "eps_high": 0.2}, [-0.5, -1.2, -1.2, 0.8, 1.5, 4.0]),
        ({"eps_low": None, "eps_high": 0.2}, [-0.5, -1.2, -1.2, 0.5, 1.5, 4.0]),
        ({"eps_low": 0.2, "eps_high": None}, [-0.5, -1.5, -4.0, 0.8, 1.5, 4.0]),
        ({"eps_low": None, "eps_high": None, "dual_clip": 3.0}, [-0.5, -1.5, -4.0, 0.5, 1.5, 3.0]),
    ],
    ids=str,
)
def test_each_bound_of_the_surrogate_may_be_absent(options: Mapping[str, Any], losses: list[float]) -> None:
    rho = torch.tensor([0.5, 1.5, 4.0] * 2, dtype=torch.float64)
    advantage = torch.tensor([1.0] * 3 + [-1.0] * 3, dtype=torch.float64)
    assert clipped_loss(rho.log(), torch.zeros(6), advantage, **options).loss.tolist() == pytest.approx(losses)


def test_without_old_log_probs_the_ratio_is_1_with_the_gradient_of_logp() -> None:
    logp = normal(4).requires_grad_()
    ratio = importance_ratio(logp, None)
    ratio.sum().backward()
    assert ratio.tolist() == [1.0] * 4 and logp.grad is not None and logp.grad.tolist() == [1.0] * 4


def test_the_expected_gradient_over_tokens_of_another_policy_is_that_of_the_expected_advantage() -> None:
    """By enumeration: E_{y ~ old}[rho A] is E_{y ~ student}[A], whatever the old policy was."""
    logits, old, advantage = normal(6).requires_grad_(), normal(6).log_softmax(-1), normal(6)
    loss = clipped_loss(logits.log_softmax(-1), old, advantage, eps_low=None, eps_high=None).loss
    (got,) = torch.autograd.grad((old.exp() * loss).sum(), logits)
    (wanted,) = torch.autograd.grad(-(logits.softmax(-1) * advantage).sum(), logits)
    torch.testing.assert_close(got, wanted)


# --- reductions -------------------------------------------------------------------------------------------------------

IDS = torch.tensor([0, 0, 0, 1, 2, 2])
COUNTED = torch.tensor([True, False, True, False, True, True])


@pytest.mark.parametrize(
    ("reduction", "length", "weights"),
    [
        ("token_mean", None, [1 / 4, 0, 1 / 4, 0, 1 / 4, 1 / 4]),
        ("sequence_mean", None, [1 / 4, 0, 1 / 4, 0, 1 / 4, 1 / 4]),  # two rollouts count, two tokens of each
        ("constant", 10, [1 / 30, 0, 1 / 30, 0, 1 / 30, 1 / 30]),
    ],
)
def test_token_weights_by_hand(reduction: str, length: int | None, weights: list[float]) -> None:
    got = token_weights(reduction, COUNTED, IDS, length=length, dtype=torch.float64)
    assert got.tolist() == pytest.approx(weights, rel=1e-12)


def test_sequence_mean_weighs_rollouts_alike_and_token_mean_tokens() -> None:
    all_six = torch.ones(6, dtype=torch.bool)
    by_rollout = token_weights("sequence_mean", all_six, IDS)
    assert by_rollout.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6])
    assert token_weights("token_mean", all_six, IDS).tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize(("reduction", "length"), [("token_mean", None), ("sequence_mean", None), ("constant", 5)])
def test_a_batch_in_which_nothing_counts_has_weight_zero_and_not_nan(reduction: str, length: int | None) -> None:
    got = token_weights(reduction, torch.zeros(6, dtype=torch.bool), IDS, length=length)
    assert got.tolist() == [0.0] * 6


def test_sampler_correction_is_a_ratio_with_a_cap() -> None:
    old, sampler = torch.tensor([-1.0, -1.0, -1.0, -50.0]), torch.tensor([-1.5, -3.0, -0.5, -1.0])
    wanted = [math.exp(0.5), 2.0, math.exp(-0.5), math.exp(-20)]
    assert sampler_correction(old, sampler, 2.0).tolist() == pytest.approx(wanted, rel=1e-6)


def test_an_infinite_loss_on_a_token_of_weight_zero_is_nobodys() -> None:
    assert masked(torch.tensor([INF, math.nan, 3.0]), torch.tensor([0.0, 0.0, 0.5])).tolist() == [0.0, 0.0, 3.0]


# --- lazy distributions -----------------------------------------------------------------------------------------------

TOKENS = torch.tensor([0, 4, 2, 2])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_a_distribution_is_torchs_categorical_at_its_temperature(temperature: float) -> None:
    raw = normal(4, 5, std=4)
    dist, wanted = TokenDist(raw, TOKENS, temperature), Categorical(logits=raw / temperature)
    torch.testing.assert_close(dist.at_sampled, wanted.log_prob(TOKENS))
    torch.testing.assert_close(dist.log_probs.exp(), wanted.probs)
    torch.testing.assert_close(dist.entropy(), wanted.entropy())


def test_at_replaces_the_temperature_exactly() -> None:
    raw = normal(4, 5, std=4)
    warm = TokenDist(raw, TOKENS, 0.7)
    assert torch.equal(warm.at(1.3).log_probs, TokenDist(raw, TOKENS, 1.3).log_probs)
    assert torch.equal(warm.at(1.3).at(0.7).log_probs, warm.log_probs)
    assert warm.at(0.7) is warm


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows", [torch.tensor([True, False, True, True]), torch.tensor([3, 0])], ids=["mask", "index"])
@pytest.mark.parametrize("asked_first", [False, True])
def test_rows_of_a_distribution_are_distributions_in_their_own_right(rows: Tensor, temperature: float,
                                                                     asked_first: bool) -> None:
    raw = normal(4, 5, std=4)
    whole = TokenDist(raw, TOKENS, temperature)
    if asked_first:
        _ = whole.log_probs
    part = whole[rows]
    assert torch.equal(part.tokens, TOKENS[rows])
    torch.testing.assert_close(part.at_sampled, whole.at_sampled[rows])
    torch.testing.assert_close(part.log_probs, whole.log_probs[rows])
    torch.testing.assert_close(part.entropy(), whole.entropy()[rows])
    torch.testing.assert_close(part.at(1.0).log_probs, raw[rows].log_softmax(-1))


def test_logits_are_made_when_somebody_asks_and_once() -> None:
    made = []

    def logits() -> Tensor:
        made.append(1)
        return torch.zeros(4, 5)

    dist = TokenDist(logits, TOKENS)
    part = dist[TOKENS > 0].at(2.0)
    assert not made
    _ = dist.log_probs, dist.at_sampled, dist.entropy(), part.log_probs, dist.at(0.5).log_probs
    assert made == [1]


def test_entropy_and_log_probs_with_banned_tokens_are_finite_where_they_can_be() -> None:
    raw = torch.tensor([[0.0, -INF, 0.0]], requires_grad=True)
    dist = TokenDist(raw, torch.tensor([0]))
    assert dist.entropy().item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(dist.entropy().sum() + dist.at_sampled.sum(), raw)
    assert torch.isfinite(gradient).all() and dist.log_probs[0, 1] == -INF


# --- the head ---------------------------------------------------------------------------------------------------------


def test_a_head_scales_then_caps() -> None:
    h, head = normal(3, 4), Head(normal(7, 4), normal(7), scale=0.5, softcap=2.0)
    z = 0.5 * (h @ head.weight.T + head.bias)
    torch.testing.assert_close(project(h, head), 2.0 * torch.tanh(z / 2.0))
    torch.testing.assert_close(project(h, as_head(head.weight)), h @ head.weight.T)
    torch.testing.assert_close(project(h, as_head((head.weight, head.bias))), 2 * z)
    assert as_head(head) is head


@pytest.mark.parametrize("banned", [False, True])
def test_a_sampled_log_prob_alone_has_the_value_gradient_and_entropy_of_the_log_softmax(banned: bool) -> None:
    z, tokens, scale = normal(5, 7, std=3), torch.tensor([0, 6, 3, 3, 1]), normal(5)
    if banned:
        z[:, 4] = -torch.inf
    plain, own = z.clone().requires_grad_(), z.clone().requires_grad_()
    wanted = plain.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    dist = TokenDist(own, tokens)
    assert dist.at_sampled.equal(wanted)
    with torch.no_grad():
        p, log_p = plain.softmax(-1), plain.log_softmax(-1).clamp(min=-1e9)
        torch.testing.assert_close(dist.entropy(), -(p * log_p).sum(-1))
    (gradient,) = torch.autograd.grad((wanted * scale).sum(), plain)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(dist.at_sampled, own, scale, retain_graph=True)[0], gradient)


def test_the_chunk_is_a_function_of_the_vocabulary_and_bounded() -> None:
    assert chunk_size(50) == 1024  # whole blocks of rows, and never few
    with kernels.off():
        assert chunk_size(10**9) == FEWEST
    assert chunk_size(10**9) == (loops.MANY if loops.usable() else FEWEST)
    assert (chunk_size(10_000) - 32) * 10_000 < CHUNK_ELEMENTS <= chunk_size(10_000) * 10_000


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_sampled_log_probs_are_those_of_the_whole_vocabulary(chunk: int | None) -> None:
    h, head, tokens = normal(9, 4, std=5), Head(normal(7, 4), normal(7), softcap=20.0), torch.randint(0, 7, (9,))
    logp, entropy = sampled_log_probs(h.requires_grad_(), head, tokens, chunk=chunk, temperature=1.7, entropy=True)
    wanted = Categorical(logits=project(h, head).detach() / 1.7)
    torch.testing.assert_close(logp, wanted.log_prob(tokens))
    torch.testing.assert_close(entropy, wanted.entropy())
    assert not logp.requires_grad and sampled_log_probs(h, head, tokens)[1] is None


def forward_kl(student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
    loss = kl(views["teacher"].log_probs, student.log_probs) * credit["scale"]
    return TokenLoss(loss, {"seen": student.tokens * 1.0})


def head_case() -> tuple[dict[str, Tensor], dict[str, Head], Tensor, Credit, Tensor]:
    hidden = {"student": normal(9, 4, std=3).requires_grad_(), "teacher": normal(9, 4, std=3)}
    own = Head(normal(7, 4).requires_grad_(), normal(7).requires_grad_(), scale=0.5, softcap=5.0)
    credit = {"scale": normal(9)}
    return hidden, {"student": own, "teacher": Head(normal(7, 4))}, torch.randint(0, 7, (9,)), credit, normal(9)


def test_the_chunked_heads_gradient_is_that_of_its_value() -> None:
    hidden, heads, tokens, credit, weight = head_case()
    own = heads["student"]

    def value(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return chunked_loss(forward_kl, {**hidden, "student": h}, {**heads, "student": Head(w, b, 0.5, 5.0)}, tokens,
                            credit, weight, chunk=4).loss

    assert own.bias is not None
    assert gradcheck(value, (hidden["student"], own.weight, own.bias))


def test_the_chunked_head_never_holds_more_than_a_chunk_of_logits_and_returns_every_token() -> None:
    hidden, heads, tokens, credit, weight = head_case()
    shapes = []

    def looking(student: TokenDist, views: Mapping[str, TokenDist], part: Credit) -> TokenLoss:
        shapes.append(tuple(student.logits.shape))
        return forward_kl(student, views, part)

    out = chunked_loss(looking, hidden, heads, tokens, credit, weight, chunk=4)
    assert shapes == [(4, 7), (4, 7), (1, 7)]
    logits = {view: project(h, heads[view]) for view, h in hidden.items()}
    torch.testing.assert_close(out.token_loss, (kl(logits["teacher"].log_softmax(-1), logits["student"].log_softmax(-1))
                                                * credit["scale"]).detach())
    wanted = Categorical(logits=logits["student"])
    torch.testing.assert_close(out.metrics["logp"], wanted.log_prob(tokens).detach())
    torch.testing.assert_close(out.metrics["entropy"], wanted.entropy().detach())
    assert torch.equal(out.metrics["seen"], tokens * 1.0)


@pytest.mark.parametrize("asking", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids=str)
def test_gradients_go_to_those_of_hidden_weight_and_bias_that_ask(asking: tuple[str, ...]) -> None:
    hidden, heads, tokens, credit, weight = head_case()
    parts = {"hidden": hidden["student"], "weight": heads["student"].weight, "bias": heads["student"].bias}
    full = torch.autograd.grad(chunked_loss(forward_kl, hidden, heads, tokens, credit, weight, chunk=4).loss,
                               list(parts.values()))
    for name, part in parts.items():
        part.requires_grad_(name in asking)
    loss = chunked_loss(forward_kl, hidden, heads, tokens, credit, weight, chunk=4).loss
    assert loss.requires_grad is bool(asking)
    if asking:
        (2.5 * loss).backward()
    for (name, part), wanted in zip(parts.items(), full, strict=True):
        if name in asking:
            torch.testing.assert_close(part.grad, 2.5 * wanted)
        else:
            assert part.grad is None


def test_a_head_gradient_that_is_added_at_once_is_the_returned_one_and_refuses_a_later_scale() -> None:
    hidden, heads, tokens, credit, weight = head_case()
    plain = torch.autograd.grad(chunked_loss(forward_kl, hidden, heads, tokens, credit, weight, chunk=4).loss,
                                (hidden["student"], heads["student"].weight))
    into = torch.ones_like(heads["student"].weight)
    loss = chunked_loss(forward_kl, hidden, heads, tokens, credit, weight, chunk=4, head_grad=into).loss
    loss.backward(retain_graph=True)
    assert heads["student"].weight.grad is None
    torch.testing.assert_close(into - 1, plain[1])
    torch.testing.assert_close(hidden["student"].grad, plain[0])
    with pytest.raises(RuntimeError, match=r"scales it by 0\.5"):
        (loss / 2).backward()


def test_autograd_takes_over_the_heads_gradient_and_copies_it_only_for_a_graph_that_is_kept() -> None:
    """A copy would be one more tensor as large as the head."""
    hidden, head = torch.randn(5, 4).requires_grad_(), torch.randn(7, 4).requires_grad_()

    def made() -> Tensor:
        return chunked_loss(lambda student, views, credit: TokenLoss(-student.at_sampled, {}), {"student": hidden},
                            {"student": Head(head)}, torch.arange(5), {}, torch.ones(5), chunk=2).loss

    loss = made()
    place = loss.grad_fn.grads.weight.data_ptr()
    loss.backward()
    assert head.grad is not None and head.grad.data_ptr() == place
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()
    once = [head.grad.clone(), hidden.grad.clone()]
    head.grad = hidden.grad = None
    loss = made()
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    assert torch.allclose(head.grad, 4 * once[0]) and torch.allclose(hidden.grad, 4 * once[1])


def test_under_no_grad_the_chunked_head_only_counts() -> None:
    hidden, heads, tokens, credit, weight = head_case()
    with torch.no_grad():
        out = chunked_loss(forward_kl, hidden, heads, tokens, credit, weight)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, chunked_loss(forward_kl, hidden, heads, tokens, credit, weight).loss.detach())


def test_the_temperature_of_the_rollouts_divides_the_logits_of_every_view() -> None:
    hidden, heads, tokens, credit, weight = head_case()
    got = chunked_loss(forward_kl, hidden, heads, tokens, credit, weight, temperature=1.6)
    student, teacher = ((project(hidden[view], heads[view]) / 1.6).log_softmax(-1) for view in ("student", "teacher"))
    torch.testing.assert_close(got.loss, (kl(teacher, student) * credit["scale"] * weight).sum())


def test_a_view_that_nobody_reads_is_never_projected() -> None:
    hidden, heads, tokens, credit, weight = head_case()
    heads["teacher"] = Head(torch.zeros(7, 99))  # of no width that could be projected

    def own_alone(student: TokenDist, views: Mapping[str, TokenDist], part: Credit) -> TokenLoss:
        return TokenLoss(-student.at_sampled)

    assert torch.isfinite(chunked_loss(own_alone, hidden, heads, tokens, credit, weight).loss)
    with pytest.raises(RuntimeError):
        chunked_loss(forward_kl, hidden, heads, tokens, credit, weight)


def test_of_a_view_only_the_rows_that_somebody_takes_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, heads, tokens, credit, weight = head_case()
    whole = chunked_loss(forward_kl, hidden, heads, tokens, {**credit, "scale": (tokens > 2) * 1.0}, weight, chunk=4)
    projected = list[int]()

    def counting(states: Tensor, head: Head) -> Tensor:
        projected.append(len(states))
        return project(states, head)

    def some(student: TokenDist, views: Mapping[str, TokenDist], part: Credit) -> TokenLoss:
        rows = student.tokens > 2
        found = kl(views["teacher"][rows].log_probs, student[rows].log_probs)
        return TokenLoss(torch.zeros_like(student.at_sampled).masked_scatter(rows, found))

    monkeypatch.setattr(chunked, "project", counting)
    part = chunked_loss(some, hidden, heads, tokens, credit, weight, chunk=4)
    torch.testing.assert_close(part.loss, whole.loss)
    assert 0 < sum(projected) == int((tokens > 2).sum()) < len(tokens)
    dist = TokenDist(lambda: pytest.fail("the whole was not asked for"), tokens, 2.0,
                     lambda rows: project(hidden["teacher"][rows], heads["teacher"]))
    expected = (project(hidden["teacher"], heads["teacher"]) / 0.5).log_softmax(-1)[tokens > 2]
    torch.testing.assert_close(dist.at(0.5)[tokens > 2].log_probs, expected)


def test_a_loss_that_does_not_depend_on_the_student_has_gradient_zero() -> None:
    hidden, heads, tokens, credit, weight = head_case()

    def constant(student: TokenDist, views: Mapping[str, TokenDist], part: Credit) -> TokenLoss:
        return TokenLoss(part["scale"])

    chunked_loss(constant, hidden, heads, tokens, credit, weight).loss.backward()
    assert hidden["student"].grad is not None and (hidden["student"].grad == 0).all()
