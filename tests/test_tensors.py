"""Packing by hand and against its own definition, budgets, and log-probs at minus infinity."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selftaught import tensors
from selftaught.tensors import (
    FEW,
    LOCAL,
    MANY,
    MIN_COMMON,
    Group,
    common_prefix,
    difference,
    fast_linear,
    largest,
    offsets,
    pack,
    product,
    ratio,
    segment_mean,
    segment_sum,
    split_by_budget,
    split_padded,
    upcast,
)

INF = math.inf
Ids = tuple[int, ...]


# --- packing ----------------------------------------------------------------------------------------------------------


def test_pack_lays_out_each_prompt_once_with_the_inputs_of_its_responses() -> None:
    """Prompts a a b a; the last token of a response predicts nothing, so (7,) adds no input."""
    a, b = (1, 2, 3), (4, 5)
    packed = pack([a, a, b, a], [(10, 11, 12), (7,), (20, 21), (30, 31)])
    #                                1  2  3 [10 11] [] [30]  4  5 [20]
    assert packed.token_ids.tolist() == [1, 2, 3, 10, 11, 30, 4, 5, 20]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert packed.predict.tolist() == [2, 3, 4, 2, 7, 8, 2, 5]
    assert packed.common == 0
    assert packed.groups == (Group(0, 3, (2, 0, 1)), Group(6, 2, (1,)))
    assert packed.rows[1] == (a, (7,))
    assert packed.token_ids.dtype == packed.positions.dtype == packed.predict.dtype == torch.int64


def test_pack_computes_a_response_that_several_rollouts_gave_once() -> None:
    """The last token predicts nothing, so (10, 11, 12) and (10, 11, 13) are one; under another prompt they are not."""
    a, b = (1, 2), (4,)
    packed = pack([a, a, b, a, a], [(10, 11, 12), (7,), (10, 11, 12), (10, 11, 13), (8,)])
    assert packed.token_ids.tolist() == [1, 2, 10, 11, 4, 10, 11]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert packed.predict.tolist() == [1, 2, 3, 1, 4, 5, 6, 1, 2, 3, 1]
    assert packed.groups == (Group(0, 2, (2, 0)), Group(4, 1, (2,)))


def test_pack_computes_what_all_prompts_begin_with_once() -> None:
    shared = tuple(range(100, 100 + MIN_COMMON))
    packed = pack([(*shared, 1, 2), (*shared, 3)], [(8, 9), (7, 6)])
    assert packed.common == MIN_COMMON
    assert packed.token_ids.tolist() == [*shared, 1, 2, 8, 3, 7]
    first = MIN_COMMON
    assert packed.positions.tolist() == [*range(MIN_COMMON), first, first + 1, first + 2, first, first + 1]
    assert packed.predict.tolist() == [first + 1, first + 2, first + 3, first + 4]
    assert packed.groups == (Group(first, 2, (1,)), Group(first + 3, 1, (1,)))


def rollouts(seed: int, shared: int = 0) -> tuple[list[Ids], list[Ids]]:
    """Prompts out of few, in any order, and responses of 1 to 6 tokens, short ones more than once."""
    draw = random.Random(seed)
    start = tuple(draw.randrange(9) for _ in range(shared))
    known = [start + tuple(draw.randrange(9) for _ in range(draw.randint(1, 5))) for _ in range(4)]
    prompts = [draw.choice(known) for _ in range(12)]
    return prompts, [tuple(draw.randrange(2) for _ in range(draw.randint(1, 6))) for _ in prompts]


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("seed", range(20))
def test_every_scored_token_is_predicted_from_the_token_and_position_before_it(seed: int, shared: int) -> None:
    prompts, responses = rollouts(seed, shared)
    packed = pack(prompts, responses)
    wanted = [((*p, *r)[len(p) + t - 1], len(p) + t - 1)
              for p, r in zip(prompts, responses, strict=True) for t in range(len(r))]
    got = [(int(packed.token_ids[i]), int(packed.positions[i])) for i in packed.predict]
    assert got == wanted
    used = packed.common + sum(group.prompt + sum(group.responses) for group in packed.groups)
    assert used == len(packed.token_ids) == len(packed.positions)
    distinct = {p: sum(map(len, {r[:-1] for q, r in zip(prompts, responses, strict=True) if q == p})) for p in prompts}
    assert used == packed.common + sum(len(p) - packed.common + inputs for p, inputs in distinct.items())


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([(1,) * 30], 0),  # one prompt has nothing to share
        ([(1,) * 30] * 3, 0),
        ([(1,) * 20 + (2,), (1,) * 20 + (3,)], 20),
        ([(1,) * 15 + (2,), (1,) * 15 + (3,)], 0),  # not worth a segment
        ([(1,) * 16 + (2,), (1,) * 16 + (3,)], 16),
        ([(1,) * 20, (1,) * 25], 19),  # a prompt keeps a token of its own
        ([(1,) * 20 + (9,), (1,) * 18 + (5, 5, 5), (1,) * 20 + (2,)], 18),
    ],
)
def test_common_prefix_by_hand(prompts: list[Ids], shared: int) -> None:
    assert common_prefix(prompts) == shared


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40).map(tuple), min_size=2, max_size=5),
       st.integers(0, 30))
def test_common_prefix_is_common_to_all_and_leaves_each_a_token(tails: list[Ids], zeros: int) -> None:
    prompts = [(0,) * zeros + tail for tail in tails]
    shared = common_prefix(prompts)
    longest = max(k for k in range(min(map(len, prompts))) if len({p[:k] for p in prompts}) == 1)
    assert shared == (longest if len(set(prompts)) > 1 and longest >= MIN_COMMON else 0)


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
@pytest.mark.parametrize("seed", range(10))
def test_micro_batches_hold_whole_rollouts_in_order_within_the_budget_of_every_view(seed: int, budget: int,
                                                                                    shared: int) -> None:
    plain, responses = rollouts(seed, shared)
    privileged = [(*prompt, 77, index % 3) for index, prompt in enumerate(plain)]
    cut = list(split_by_budget([plain, privileged], responses, budget))
    assert [index for micro in cut for index in micro] == list(range(len(plain)))
    for micro in cut:
        sizes = [len(pack([view[i] for i in micro], [responses[i] for i in micro]).token_ids)
                 for view in (plain, privileged)]
        assert len(micro) == 1 or max(sizes) <= budget
    if not shared:  # as few cuts as going in order allows
        for micro, following in itertools.pairwise(cut):
            more = [*micro, following[0]]
            assert any(len(pack([view[i] for i in more], [responses[i] for i in more]).token_ids) > budget
                       for view in (plain, privileged))
    if budget == 1:
        assert all(len(micro) == 1 for micro in cut)
    if budget == 10_000:
        assert len(cut) == 1


@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
@pytest.mark.parametrize("seed", range(10))
def test_padded_micro_batches_pay_every_row_at_the_length_of_the_longest(seed: int, budget: int) -> None:
    plain, responses = rollouts(seed)
    privileged = [prompt + (77,) * (index % 3) for index, prompt in enumerate(plain)]
    rows = [[len(view[i]) + len(response) - 1 for i, response in enumerate(responses)] for view in (plain, privileged)]

    def size(micro: Sequence[int]) -> int:
        return max(len(micro) * max(lengths[i] for i in micro) for lengths in rows)

    cut = list(split_padded([plain, privileged], responses, budget))
    assert [index for micro in cut for index in micro] == list(range(len(plain)))
    assert all(len(micro) == 1 or size(micro) <= budget for micro in cut)
    for micro, following in itertools.pairwise(cut):  # as few cuts as going in order allows
        assert size([*micro, following[0]]) > budget


def test_split_of_nothing_is_nothing() -> None:
    assert list(split_by_budget([[]], [], 10)) == list(split_padded([[]], [], 10)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 20, 1001])
def test_quantiles_are_numpys(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size)).exp()
    near = 1e-6 if dtype == torch.float32 else 1e-14
    for q in (0.0, 0.05, 1 / 3, 0.5, 0.6, 0.95, 1.0):
        found = LOCAL.quantile(x, q)
        assert found.shape == () and found.dtype == dtype
        assert float(found) == pytest.approx(np.quantile(x.double().numpy(), q), rel=near)
    assert LOCAL.quantile(x[:0], 0.95) == 0


def test_quantiles_have_no_limit_of_size() -> None:
    """torch.quantile refuses more than 16 million numbers; a batch of 512 long rollouts has them."""
    x = torch.arange(16_000_001, dtype=torch.float32).flip(0)
    assert LOCAL.quantile(x, 0.95) == 15_200_000 and LOCAL.quantile(x, 1 / 3) == pytest.approx(16e6 / 3, abs=1)


def test_offsets_are_running_sums_from_zero() -> None:
    assert offsets([3, 1, 4]) == [0, 3, 4, 8]
    assert offsets([]) == [0]


# --- minus infinity and precision -------------------------------------------------------------------------------------


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_difference_is_zero_without_gradient_where_both_are_minus_infinity() -> None:
    a, b = leaf(-1.0, -INF, -INF, -2.0), leaf(-3.0, -INF, -1.0, -INF)
    gap = difference(a, b)
    assert gap.tolist() == [2.0, 0.0, -INF, INF]
    gap.sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad.tolist() == [1, 0, 1, 1] and b.grad.tolist() == [-1, 0, -1, -1]


def test_ratio_is_clamped_at_20_nats_so_that_minus_infinity_is_the_limit_of_very_unlikely() -> None:
    a, b = leaf(-1.0, -INF, -INF, -2.0, -1e4, 0.0), leaf(-3.0, -INF, -1.0, -INF, 0.0, -1e4)
    found = ratio(a, b)
    assert found.tolist() == pytest.approx([math.e**2, 1.0, *[math.exp(s) for s in (-20, 20, -20, 20)]], rel=1e-12)
    found.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == pytest.approx([math.e**2, 0, 0, 0, 0, 0])


def test_product_is_zero_in_value_and_gradient_where_the_probability_is_zero() -> None:
    p, log_ratio = leaf(0.0, 0.5, 0.0, 0.0), leaf(INF, 2.0, -INF, math.nan)
    out = product(p, log_ratio)
    assert out.tolist() == [0.0, 1.0, 0.0, 0.0]
    out.sum().backward()
    assert p.grad is not None and log_ratio.grad is not None
    assert p.grad.tolist() == [0.0, 2.0, 0.0, 0.0] and log_ratio.grad.tolist() == [0.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given_dtype", "wanted"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
     (torch.float16, torch.float32)],
)
def test_upcast_is_to_float32_and_float64_stays(given_dtype: torch.dtype, wanted: torch.dtype) -> None:
    assert upcast(torch.zeros(1, dtype=given_dtype)).dtype == wanted


# --- segments ---------------------------------------------------------------------------------------------------------


def test_segment_sum_and_mean_by_hand() -> None:
    values, ids = torch.tensor([1.0, 2.0, 4.0, 8.0, math.nan]), torch.tensor([2, 0, 2, 2, 3])
    where = torch.tensor([True, True, False, True, False])
    assert segment_sum(values[:4], ids[:4], 4).tolist() == [2.0, 0.0, 13.0, 0.0]
    assert segment_mean(values[:4], ids[:4], 4).tolist() == pytest.approx([2.0, 0.0, 13 / 3, 0.0])
    assert segment_mean(values, ids, 4, where).tolist() == [2.0, 0.0, 4.5, 0.0]


def test_the_reducer_of_one_process_changes_nothing() -> None:
    x = torch.tensor([0.0, 1.0, 4.0])
    assert LOCAL.sum(x) is x and LOCAL.gather(x) is x and LOCAL.quantile(x, 0.75).item() == 2.5


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (FEW,), (FEW + 1,), (MANY,), (2, MANY)])
@pytest.mark.parametrize("wide", [False, True])
def test_the_fast_product_is_the_product(amd: bool, dtype: torch.dtype, shape: tuple[int, ...], wide: bool,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "is_intel", lambda: not amd)
    monkeypatch.setattr(tensors, "WIDE", 3 if wide else 6)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((*shape, 16), (16, 5)))
    for factor, matrix in enumerate((weight.t(), weight.t().contiguous()), 1):
        found = fast_linear(x * factor, matrix)  # else memory used again would hold the right numbers
        torch.testing.assert_close(found, (x * factor) @ weight)


def test_the_fast_product_has_the_gradients_of_the_product() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    found, plain = (torch.autograd.grad(f.sum(), (x, weight)) for f in (fast_linear(x, weight), x @ weight.t()))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_the_largest_are_found_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "NEIGHBOURS", 4)
    x = torch.randn(6, 201, generator=torch.Generator().manual_seed(6))
    x[1, -3:] = 50.0  # the last in no group
    x[2, 16:20] = 50.0  # a whole group
    x[3, 3:] = -torch.inf  # fewer than k are possible
    x[4] = x[4].round()  # ties
    for k in (1, 6, 201 // 8):
        found = largest(x, k)
        assert all(len(set(row)) == k for row in found.tolist())
        assert (x.gather(-1, found).sort(-1, descending=True).values == x.topk(k).values).all()
