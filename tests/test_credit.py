"""Group advantages, what counts, and evidence, against numpy and numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selftaught.credit import base_credit, broadcast, evidence, evidence_weight, group_advantage
from selftaught.records import TokenBatch

NAN, INF = math.nan, math.inf


def batch_of(reward: Tensor, group: list[int]) -> TokenBatch:
    """One token per rollout."""
    n = len(group)
    return TokenBatch(torch.zeros(n, dtype=torch.int64), torch.arange(n), reward, torch.tensor(group))


def advantages(reward: list[float], group: list[int], dtype: torch.dtype = torch.float64, **options: bool) -> Tensor:
    return group_advantage(batch_of(torch.tensor(reward, dtype=dtype), group), **options)


# --- group advantages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_group_advantage_is_numpys_by_the_definition(seed: int, scale_by_std: bool) -> None:
    draw = np.random.default_rng(seed)
    group = draw.choice([5, -3, 100, 8], size=40)  # any ids, in any order
    reward = np.where(draw.random(40) < 0.15, NAN, draw.normal(size=40) * 3 + 50)
    wanted = np.zeros(40)
    for g in set(group.tolist()):
        mine = (group == g) & ~np.isnan(reward)
        deviation = reward[mine] - reward[mine].mean()
        wanted[mine] = deviation / (reward[mine].std(ddof=1) + 1e-6) if scale_by_std else deviation
    got = advantages(reward.tolist(), group.tolist(), scale_by_std=scale_by_std)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-10, atol=1e-12)


def test_one_right_of_four_by_hand() -> None:
    assert advantages([1, 0, 0, 0], [0] * 4).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages([1, 0, 0, 0], [0] * 4, scale_by_std=False).tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.7, 1.0, -1.1, 1e6 + 0.1])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_equal_rewards_and_groups_of_one_have_no_advantage_at_all(reward: float, size: int, dtype: torch.dtype) -> None:
    got = advantages([reward] * size + [NAN, 0.0, 1.0], [0] * size + [0, 1, 1], dtype)
    assert (got[: size + 1] == 0).all() and (got[-2:] != 0).all()


@pytest.mark.parametrize(
    ("spread", "dead"), [(0.9e-9, True), (1.1e-9, False)], ids=["within_rounding", "a_difference"]
)
@pytest.mark.parametrize("size", [0.01, 1.0, 1e6])
def test_rewards_within_rounding_of_the_largest_are_equal(size: float, spread: float, dead: bool) -> None:
    step = spread * max(1.0, size)
    got = advantages([size - step, size + step], [0, 0], scale_by_std=False)
    assert bool((got == 0).all()) is dead


def test_a_rollout_without_a_score_is_left_out_of_its_groups_statistics() -> None:
    with_it = advantages([1.0, NAN, 0.0, 0.0], [0] * 4)
    assert with_it[[0, 2, 3]].tolist() == advantages([1.0, 0.0, 0.0], [0] * 3).tolist() and with_it[1] == 0
    assert advantages([NAN, NAN, 1.0], [0, 0, 0]).tolist() == [0, 0, 0]  # one score alone is a group of one


def test_group_advantage_needs_rewards_and_groups() -> None:
    batch = batch_of(torch.tensor([1.0]), [0])
    for part in ("reward", "group"):
        with pytest.raises(ValueError, match="needs `reward`"):
            group_advantage(TokenBatch(**{**vars(batch), part: None}))


# --- what counts ------------------------------------------------------------------------------------------------------

IDS = torch.tensor([0, 0, 1, 2, 2, 2])
BATCH = TokenBatch(
    torch.zeros(6, dtype=torch.int64), IDS, reward=torch.tensor([NAN, 1.0, 0.0]), group=torch.zeros(3),
    privileged=torch.tensor([True, False, True]), mask=torch.tensor([True, True, True, False, True, True]),
)  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "counted"),
    [
        ({}, [1, 1, 1, 0, 1, 1]),
        ({"needs_reward": True}, [0, 0, 1, 0, 1, 1]),
        ({"needs_privilege": True}, [1, 1, 0, 0, 1, 1]),
        ({"needs_reward": True, "needs_privilege": True}, [0, 0, 0, 0, 1, 1]),
    ],
    ids=str,
)
def test_counted_is_the_mask_and_what_the_method_needs(needs: dict[str, bool], counted: list[int]) -> None:
    credit = base_credit(BATCH, **needs)
    assert credit["counted"].tolist() == [bool(c) for c in counted] and "logp_old" not in credit


def test_without_a_mask_or_privileges_every_token_counts() -> None:
    plain = TokenBatch(torch.zeros(6, dtype=torch.int64), IDS, logp_old=torch.randn(6, requires_grad=True))
    credit = base_credit(plain, needs_privilege=True)
    assert credit["counted"].all() and not credit["logp_old"].requires_grad


def test_broadcast_gives_each_token_the_value_of_its_rollout() -> None:
    assert broadcast(torch.tensor([5.0, 6.0, 7.0]), BATCH).tolist() == [5, 5, 6, 7, 7, 7]


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_evidence_is_clamped_and_none_where_both_say_impossible() -> None:
    teacher = torch.tensor([-1.0, -30.0, -0.5, -INF, -INF, -1.0])
    student = torch.tensor([-3.0, -0.5, -1e10, -INF, -1.0, -INF])
    assert evidence(teacher, student).tolist() == [2.0, -20.0, 20.0, 0.0, -20.0, 20.0]


@pytest.mark.parametrize(
    ("d", "advantage", "weight"),
    [
        (0.1, 2.0, math.exp(0.1)),
        (0.1, -2.0, math.exp(-0.1)),  # what the teacher would have said too is blamed less
        (5.0, 2.0, 1.2),
        (5.0, -2.0, 0.8),
        (-5.0, 2.0, 0.8),
        (-5.0, -2.0, 1.2),
        (5.0, 0.0, 1.0),  # no sign, no weight
    ],
)
def test_evidence_weight_by_hand(d: float, advantage: float, weight: float) -> None:
    got = evidence_weight(torch.tensor([d]).double(), torch.tensor([advantage]).double(), 0.2)
    assert got.item() == pytest.approx(weight, rel=1e-7)
