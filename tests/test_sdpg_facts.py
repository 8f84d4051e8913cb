"""What is true of SDPG (arXiv 2606.04036) beside what `test_method_facts` holds: gate, live teacher, precision, bridge.

Expectations are sums over the whole vocabulary, never samples.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selftaught.loss import kl, reference_penalty
from selftaught.methods import chunked_objective, objective
from selftaught.records import TokenBatch
from selftaught.studies.laws.rlsd import LAM, SIZE, expected_update
from tabular import LENGTHS, V, close, distributions, gradient, make_case, outcome

SEEDS = pytest.mark.parametrize("seed", range(3))
FLAT = {"beta_warmup": 0, "beta_decay": 0}  # no schedule: beta_k is beta
ENDS = torch.tensor([place == length - 1 for length in LENGTHS for place in range(length)])


def sampled(logits: Tensor, batch: TokenBatch) -> Tensor:
    return logits.log_softmax(-1).gather(1, batch.tokens[:, None]).squeeze(1)


# --- gradients --------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("kind", ["urkl", "rkl", "ufkl", "fkl"])
def test_the_gradient_is_that_of_finite_differences(kind: str, seed: int) -> None:
    """On-policy with equal rewards: the surrogate has no say, and the ratio before the rest is 1."""
    batch, logits = make_case(seed)
    batch = replace(batch, reward=torch.ones(len(LENGTHS), dtype=torch.float64))
    logits = {view: 0.3 * value for view, value in logits.items()}  # of a size at which a central difference is exact
    fields: dict[str, Any] = {"beta": 0.5, "alpha": 0.3, "gate": "all", "reference_kl": kind, **FLAT}
    found = outcome("sdpg", (batch, logits), **fields)[1]
    h = 1e-5
    for row, entry in ((0, 0), (4, 7), (12, int(batch.tokens[12])), (20, 3)):
        step = torch.zeros_like(found)
        step[row, entry] = h
        up, down = (outcome("sdpg", (batch, {**logits, "student": logits["student"] + sign * step}), **fields)[0]
                    for sign in (1, -1))
        assert float(found[row, entry]) == pytest.approx(float(up - down) / (2 * h), abs=1e-9)
    assert found.abs().max() > 1e-3


class Tied(torch.nn.Module):
    """A language model of one layer whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(V, 5), torch.nn.Linear(5, 5)
        self.double()

    def forward(self, context: Tensor, before: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embed(context) + self.embed(before)))


@pytest.mark.parametrize("chunk", [None, 4], ids=["dense", "chunked"])
def test_a_live_teacher_teaches_as_its_deep_copy_does(chunk: int | None) -> None:
    """Student and teacher share every weight, the tied head too: no gradient may pass through the teacher's pass."""
    torch.manual_seed(0)
    model = Tied()
    batch, _ = make_case()
    before = torch.randint(0, V, batch.tokens.shape)
    fields: dict[str, Any] = {"beta": 0.5, "alpha": 0.1, "gate": "all", **FLAT}

    def gradients(teacher: Tied, *, through: bool = False) -> list[Tensor]:
        hidden = {"student": model(torch.zeros_like(before), before),
                  "teacher": teacher(torch.ones_like(before), before),
                  "reference": torch.zeros(len(before), 5, dtype=torch.float64)}
        heads = {"student": model.embed.weight, "teacher": teacher.embed.weight, "reference": torch.ones(V, 5).double()}
        logits = {view: hidden[view] @ heads[view].t() for view in hidden}
        loss = (objective("sdpg", batch, logits, **fields) if chunk is None else
                chunked_objective("sdpg", batch, hidden, heads, chunk=chunk, **fields)).loss
        if through:
            s, t = (logits[view].log_softmax(-1) for view in ("student", "teacher"))
            loss = loss + 0.5 * (kl(s, t) - kl(s, t.detach())).mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    live, copied, leaking = gradients(model), gradients(copy.deepcopy(model)), gradients(model, through=True)
    assert all(close(a, b, 1e-16) and a.abs().max() > 1e-3 for a, b in zip(live, copied, strict=True))
    assert not any(close(a, b, 1e-4) for a, b in zip(live, leaking, strict=True))


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_a_group_of_equal_rewards_is_moved_by_the_penalty_alone_and_by_the_teacher_only_without_the_gate(
    old: bool,
) -> None:
    batch, logits = make_case(old=old)
    batch = replace(batch, reward=torch.tensor([0.3, 0.3, 0.3, 0.0, 1.0, 0.5], dtype=torch.float64))
    equal = batch.sequence_ids < 3
    own, reference = (sampled(logits[view], batch) for view in ("student", "reference"))
    rho = (own - (own if batch.logp_old is None else batch.logp_old)).exp()
    teacher = logits["teacher"].log_softmax(-1)
    pull = gradient(lambda x: (rho * kl(x.log_softmax(-1), teacher)).mean(), logits["student"])
    penalty = gradient(lambda x: (rho * reference_penalty("urkl", sampled(x, batch), reference)).mean(),
                       logits["student"])
    found = outcome("sdpg", (batch, logits), beta=5.0, alpha=0.0, **FLAT)[1]
    assert (found[equal] == 0).all() and found[~equal].abs().max() > 1e-2
    assert close(outcome("sdpg", (batch, logits), beta=5.0, alpha=0.2, **FLAT)[1][equal], 0.2 * penalty[equal])
    ungated = outcome("sdpg", (batch, logits), beta=5.0, alpha=0.0, gate="all", **FLAT)[1]
    assert close(ungated[equal], 5 * pull[equal]) and ungated[equal].abs().max() > 1e-2


def test_the_gate_divides_by_all_tokens_and_not_by_those_that_it_lets_through() -> None:
    batch, logits = make_case()
    praised = objective("grpo", batch, logits).credit["advantage"] > 0
    on, off = (outcome("sdpg", (batch, logits), beta=beta, alpha=0.0, **FLAT)[0] for beta in (1.0, 0.0))
    part = kl(logits["student"].log_softmax(-1), logits["teacher"].log_softmax(-1))
    assert close(on - off, part[praised].sum() / len(praised)) and 0 < praised.sum() < len(praised) - 5


@pytest.mark.parametrize("old", [False, True])
def test_leaving_out_stop_tokens_takes_the_teachers_term_from_them_and_nothing_else(old: bool) -> None:
    batch, logits = make_case(old=old)
    batch = replace(batch, terminal=ENDS)
    fields: dict[str, Any] = {"beta": 0.5, "alpha": 0.1, "gate": "all", **FLAT}
    with_them, without = (objective("sdpg", batch, logits, exclude_terminal=on, **fields) for on in (False, True))
    rest = objective("sdpg", batch, logits, **{**fields, "beta": 0.0})  # surrogate and penalty
    assert torch.equal(without.token_loss[ENDS], rest.token_loss[ENDS])
    assert torch.equal(without.token_loss[~ENDS], with_them.token_loss[~ENDS])
    assert (with_them.token_loss - without.token_loss)[ENDS].min() > 1e-2
    assert all(torch.equal(with_them.credit[name], without.credit[name]) for name in ("advantage", "counted", "beta"))
    gradients = [outcome("sdpg", (batch, logits), exclude_terminal=True, **{**fields, "beta": beta})[1]
                 for beta in (0.5, 0.0)]
    assert torch.equal(gradients[0][ENDS], gradients[1][ENDS]) and gradients[0][ENDS].abs().max() > 1e-3


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_the_chunked_kl_is_the_dense_one_in_float32_where_a_softmax_in_bfloat16_is_not(chunk: int | None) -> None:
    torch.manual_seed(0)
    n, width, vocabulary = 24, 16, 3000
    hidden = {view: torch.randn(n, width) for view in ("student", "teacher", "reference")}
    heads = {view: torch.randn(vocabulary, width) for view in hidden}
    batch = TokenBatch(torch.randint(0, vocabulary, (n,)), torch.arange(n) // 6, torch.tensor([1.0, 0.0, 0.0, 0.0]),
                       torch.zeros(4, dtype=torch.int64))
    found = chunked_objective("sdpg", batch, hidden, heads, chunk=chunk, gate="all", **FLAT).metrics["kl"]
    logits = {view: hidden[view].double() @ heads[view].double().t() for view in hidden}
    exact = kl(*(logits[view].log_softmax(-1) for view in ("student", "teacher")))
    rough = kl(*(logits[view].bfloat16().log_softmax(-1) for view in ("student", "teacher"))).double()
    assert found.dtype == torch.float32 and exact.min() > 0.5
    assert (found / exact - 1).abs().max() < 1e-5
    assert (rough / exact - 1).abs().mean() > 1e-3  # what the authors' code carries


# --- KL in the reward, and the bridge to RLSD -------------------------------------------------------------------------


@pytest.mark.parametrize("coef", [1e-3, 1e-2, 1.0])
def test_a_kl_inside_the_reward_makes_advantages_of_order_one_of_nothing_once_divided_by_the_std(coef: float) -> None:
    """The authors' grpo baseline: all eight rollouts are right, the KL's noise of 0.01 nats alone tells them apart."""
    torch.manual_seed(0)
    noise = torch.randn(8, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    reward = 1 - coef * (0.5 + 0.01 * noise)
    batch = TokenBatch(torch.zeros(8, dtype=torch.int64), torch.arange(8), reward, torch.zeros(8, dtype=torch.int64))
    logits = {"student": torch.zeros(8, 2, dtype=torch.float64)}
    scaled, plain = (objective(name, batch, logits).credit["advantage"] for name in ("grpo", "dr_grpo"))
    std = 0.01 * coef
    assert close(scaled, -noise * std / (std + 1e-6), 1e-9) and 0.9 < scaled.abs().max() < 3
    assert close(plain, -noise * std) and plain.abs().max() < 2.1 * std


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_s7_sdpg_ungated_at_beta_lam_a_adds_to_first_order_what_unclipped_rlsd_adds(sign: float) -> None:
    """Both are lam |A| times -grad KL(S||T): SDPG exactly, RLSD by the sampled token and up to the evidence squared."""
    torch.manual_seed(0)
    z, off = distributions(20, 6), torch.randn(20, 6, dtype=torch.float64)
    far = []
    for distance in (1e-3, 1e-2, 1.0):
        teacher = (z + distance * off).log_softmax(-1)
        alone = expected_update("grpo", z, teacher, sign)
        by_rlsd = expected_update("rlsd", z, teacher, sign, lam=LAM, lam_decay=None, eps_w=0.99) - alone
        by_sdpg = expected_update("sdpg", z, teacher, sign, beta=LAM * SIZE, alpha=0.0, gate="all", **FLAT) - alone
        exact = -LAM * SIZE * gradient(lambda x, t=teacher: kl(x.log_softmax(-1), t).sum(), z)
        assert close(by_sdpg, exact, 1e-13)
        far.append(float((by_rlsd - by_sdpg).norm() / by_sdpg.norm()))
    assert far[0] < 2e-3 and far[1] == pytest.approx(10 * far[0], rel=0.1) and far[2] > 0.1
    assert math.isclose(LAM * SIZE, 0.5 * 0.5 / (math.sqrt(0.5) + 1e-6))  # some 350 times the published beta of 1e-3
