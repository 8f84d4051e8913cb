"""What a step's metrics say that the method did, against numbers worked out by hand or token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from selftaught.loss import js
from selftaught.loss.chunked import chunked_loss
from selftaught.measure import token_metrics
from selftaught.methods import batch_credit, build
from selftaught.records import Batch, TokenBatch
from selftaught.vocabulary import Head, sampled_log_probs

V, N = 7, 9
TOKENS = TokenBatch(
    tokens=torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1]), sequence_ids=torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3]),
    reward=torch.tensor([1.0, 0.0, 0.0, 0.0]), group=torch.zeros(4, dtype=torch.int64),
    privileged=torch.tensor([True, True, True, False]),
    mask=torch.tensor([True] * 8 + [False]))  # fmt: skip
TAUGHT = torch.tensor([True] * 7 + [False] * 2)


def measured(name: str, batch: TokenBatch = TOKENS, **fields: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The metrics of one step in two micro-batches of three tokens a chunk, and the log-probs (N, V) of each view."""
    method = build(name, **fields)
    draw = torch.Generator().manual_seed(0)
    hidden = {view: torch.randn(N, V, generator=draw) * 2 for view in ("student", *method.views)}
    head = Head(torch.eye(V))  # so that hidden states are logits
    heads = dict.fromkeys(hidden, head)
    logp = {view: sampled_log_probs(hidden[view], head, batch.tokens)[0] for view in ("student", *method.views)}
    credit, weight, _ = batch_credit(method, batch, logp, reduction="token_mean", length=None, sampler_cap=None)
    found = [chunked_loss(method.loss, {view: h[rows] for view, h in hidden.items()}, heads, batch.tokens[rows],
                          {key: value[rows] for key, value in credit.items()}, weight[rows], chunk=3).metrics
             for rows in (slice(0, 5), slice(5, N))]  # fmt: skip
    return token_metrics(Batch(batch, {}, ()), credit, found), {v: log_softmax(h, -1) for v, h in hidden.items()}


def at(logp_NV: Tensor) -> Tensor:
    return logp_NV[range(N), TOKENS.tokens]


def mean(values: Tensor, where: Tensor | None = None) -> Any:
    """Over the counted tokens of `TOKENS`, or some of them."""
    counted = TOKENS.mask if where is None else where
    assert counted is not None
    return pytest.approx(values.float()[counted].mean().item(), rel=1e-5)


def test_advantages_show_their_mean_and_spread_and_the_masked_share() -> None:
    metrics, _ = measured("grpo")
    # Rewards 1, 0, 0, 0: mean 1/4, unbiased std 1/2, so A = 3/2 on three tokens and -1/2 on five of the eight counted.
    assert metrics["method/advantage"] == pytest.approx((3 * 1.5 - 5 * 0.5) / 8, rel=1e-4)
    assert metrics["method/advantage_std"] == pytest.approx((15 / 64) ** 0.5 * 2, rel=1e-4)
    assert metrics["counted"] == pytest.approx(8 / 9) and metrics["masked"] == pytest.approx(1 / 9)


def test_rlsd_shows_the_spread_of_its_weights_and_the_gap_of_the_taught() -> None:
    metrics, logp = measured("rlsd", lam=0.5, eps_w=0.2)
    gap = at(logp["teacher"]) - at(logp["student"])
    sign = torch.tensor([1.0] * 3 + [-1.0] * 6)
    weight = torch.where(TAUGHT, 0.5 + 0.5 * (sign * gap).exp().clamp(0.8, 1.2), torch.ones(N))
    assert metrics["method/weight"] == mean(weight)
    assert metrics["method/weight_std"] == pytest.approx(weight[:8].std(unbiased=False).item(), rel=1e-4)
    assert metrics["method/weight_std"] > 0.01
    assert metrics["method/advantage"] == mean(weight * torch.tensor([1.5] * 3 + [-0.5] * 6))
    assert metrics["method/gap"] == mean(gap, TAUGHT) and metrics["teacher/gap_abs"] == mean(gap.abs(), TAUGHT)


def test_sdpg_shows_the_share_of_tokens_behind_its_gate_and_its_two_terms() -> None:
    metrics, logp = measured("sdpg", replace(TOKENS, step=50))
    assert metrics["method/gate"] == pytest.approx(3 / 8) and metrics["method/beta"] == pytest.approx(1e-3)
    pull = (logp["student"].exp() * (logp["student"] - logp["teacher"])).sum(-1)
    assert metrics["method/kl"] == mean(torch.where(torch.arange(N) < 3, pull, torch.zeros(N)))
    leash = (at(logp["student"]) - at(logp["reference"])) ** 2 / 2
    assert metrics["method/reference_kl"] == mean(leash)
    assert measured("sdpg", gate="all")[0]["method/gate"] == pytest.approx(7 / 8)  # one rollout has no privilege


def test_dopd_shows_the_share_of_each_route_and_no_mean_of_their_numbers() -> None:
    metrics, logp = measured("dopd", trim=0.0)
    teacher, own = at(logp["teacher"])[TAUGHT], at(logp["privileged_student"])[TAUGHT]
    gap, sure = (teacher - own).abs(), teacher.exp() + own.exp()
    near, confident = gap < gap.mean(), sure >= sure.mean()
    routes = [near & confident, near & ~confident, ~near & (teacher >= own), ~near & (teacher < own)]
    for route, rows in enumerate(routes):
        assert metrics[f"method/route_{route}"] == pytest.approx(rows.float().mean().item(), rel=1e-5), route
    assert sum(metrics[f"method/route_{route}"] for route in range(4)) == pytest.approx(1)
    assert len({metrics[f"method/route_{route}"] for route in range(4)}) > 1
    assert "method/route" not in metrics
    assert metrics["counted"] == pytest.approx(7 / 9)  # neither the masked token nor those without a privilege


def test_demopsd_shows_its_disagreement_and_how_far_it_leans_back() -> None:
    metrics, logp = measured("demopsd", top_k=None, floor=0.0, beta=5.0)
    disagreement = js(logp["reference"], logp["teacher"])
    assert metrics["method/disagreement"] == mean(disagreement, TAUGHT)
    assert metrics["method/alpha"] == mean(0.15 * (2.5 * disagreement).tanh(), TAUGHT)
    assert metrics["teacher/gap_abs"] == mean((at(logp["teacher"]) - at(logp["student"])).abs(), TAUGHT)


@pytest.mark.parametrize("name", ["opsd", "sdft", "sdpo", "demopsd", "dopd", "sdpg", "rlsd", "opd", "gkd"])
def test_every_method_with_a_teacher_shows_its_gap(name: str) -> None:
    metrics, _ = measured(name, **({"skip": 1} if name == "sdft" else {}))
    assert metrics["teacher/gap_abs"] >= abs(metrics["method/gap"]) > 0


def test_a_step_without_a_counted_token_has_no_numbers_of_a_method() -> None:
    metrics, _ = measured("opsd", replace(TOKENS, privileged=torch.zeros(4, dtype=torch.bool)))
    assert metrics == {"counted": 0.0, "masked": 1.0}
