"""The compiled loops of a CPU, against float64; and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import families
from selftaught import kernels
from selftaught.kernels import base, compiled, layer, loops, passes, probe
from selftaught.rollout.cache import DecodeCache
from selftaught.score import Backbone
from selftaught.score.attention import Segments
from selftaught.score.operations import Gate, Norm, Rotated, inverse_root
from selftaught.tensors import pack
from selftaught.vocabulary import TokenDist, affine
from test_by_hand import FORMS
from test_turned import decoded, reference, turned_layers

TIGHT = {"rtol": 2e-6, "atol": 2e-6}
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


def test_where_there_is_a_compiler_there_are_loops() -> None:
    assert loops.usable(torch.ones(1))
    probe.check()


@pytest.fixture(params=[1, 2, 3])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    """The function's value and gradients in float64, from the sum of its value and a fixed weighing."""
    inputs = [x.double().requires_grad_() for x in given]
    out = function(*inputs)
    (out * weighing(out)).sum().backward()
    return out.detach(), *(x.grad for x in inputs if x.grad is not None)


def weighing(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)


def ours(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in given]
    out = function(*inputs)
    (out * weighing(out)).sum().backward()
    return out.detach(), *(x.grad for x in inputs if x.grad is not None)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def turned_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 70, 576), (40, 3, 33)])
def test_norms_and_their_gradients(shape: tuple[int, ...], threads: int) -> None:
    x, weight = 3 * drawn(*shape), drawn(shape[-1], seed=1)
    found = ours(lambda x, weight: Norm.apply(x, weight, inverse_root(x, 1e-5)), x, weight)
    for a, b in zip(found, exact(norm, x, weight), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (70, 301)])
def test_gates_and_their_gradients(shape: tuple[int, ...], threads: int) -> None:
    gated, raised = 8 * drawn(*shape), drawn(*shape, seed=1)
    found = ours(Gate.apply, gated, raised)
    for a, b in zip(found, exact(lambda a, b: silu(a) * b, gated, raised), strict=True):
        torch.testing.assert_close(a.double(), b, **TIGHT)


def test_a_gate_s_gradient_may_lie_in_any_order() -> None:
    gated, raised = drawn(5, 32).requires_grad_(), drawn(5, 32, seed=1).requires_grad_()
    (Gate.apply(gated, raised).t() * weighing(gated.t())).sum().backward()
    wanted = exact(lambda a, b: (silu(a) * b).t(), gated.detach(), raised.detach())[1:]
    for a, b in zip((gated.grad, raised.grad), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **TIGHT)


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.5, -87.0, 0.0, 88.5, 200.0, 1e30])
def test_a_gate_far_out_is_what_it_tends_to(value: float) -> None:
    gated = torch.full((33,), value)
    torch.testing.assert_close(loops.gate(gated, torch.ones(33)), silu(gated.double()).float(), rtol=1e-5, atol=1e-36)


def test_a_gate_of_nothing_known_is_nothing_known() -> None:
    assert loops.gate(torch.full((33,), torch.nan), torch.ones(33)).isnan().all()
    odd = torch.randn(1, 7, 40).transpose(0, 1)  # contiguous, with any step along an axis of one
    torch.testing.assert_close(loops.gate(odd, odd), silu(odd) * odd, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["tokens first", "heads first", "neither"])
@pytest.mark.parametrize("heads, tokens, width", [(1, 1, 2), (3, 5, 8), (9, 70, 64)])
def test_rotary_positions_and_their_gradients(order: str, heads: int, tokens: int, width: int) -> None:
    x, angles = drawn(1, heads, tokens, width), drawn(2, 1, 1, tokens, width, seed=1)
    cos, sin = angles.cos(), angles.sin()
    if order == "tokens first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif order == "neither":
        x = torch.cat([x, x], -1)[..., :width]
    found = ours(lambda x: Rotated.apply(x, cos[0], sin[1]), x)
    wanted = exact(lambda x: turned_by(x, cos[0].double(), sin[1].double()), x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **TIGHT)


@pytest.mark.parametrize("n, height, width", [(1, 1, 16), (7, 13, 48), (70, 200, 96), (5, 12, 64)])
def test_products_that_are_added_up(n: int, height: int, width: int, threads: int,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "is_intel", lambda: True)
    assert not loops.accumulates(drawn(1, 16), drawn(1, 1), drawn(1, 16))
    monkeypatch.setattr(loops, "is_intel", lambda: False)
    a, b, before = drawn(n, height), drawn(n, width, seed=1), drawn(height, width, seed=2)
    exact = a.double().t() @ b.double()
    assert loops.accumulates(before, a, b) and not loops.accumulates(before[:, :-1], a, b[:, :-1])
    for fresh in (False, True):
        out = torch.full_like(before, torch.nan) if fresh else before.clone()
        assert loops.outer(out, a, b, fresh) is out
        torch.testing.assert_close(out.double(), exact if fresh else before + exact, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 24, 32])
@pytest.mark.parametrize("height, width", [(1, 1), (7, 40), (64, 33), (130, 1024)])
@pytest.mark.parametrize("order", ["turned", "rows"])
def test_a_product_of_few_columns(columns: int, height: int, width: int, order: str, threads: int) -> None:
    x, weight, bias = drawn(width, columns), drawn(height, width, seed=1), drawn(height, seed=2)
    gated, residual = drawn(height, columns, seed=3), drawn(height, columns, seed=4)
    wanted = silu(gated.double()) * (weight.double() @ x.double() + bias[:, None]) + residual
    given, out = x, None
    if order == "rows":
        given, out = x.t().contiguous().t(), torch.empty(columns, height).t()
        gated, residual = (y.t().contiguous().t() for y in (gated, residual))
    assert loops.multiplies(given, weight)
    found = loops.product(given, weight, bias, gated, residual, out)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    plain = loops.product(given, weight)
    torch.testing.assert_close(plain.double(), weight.double() @ x.double(), rtol=1e-5, atol=1e-4)


def test_a_column_of_a_product_does_not_depend_on_those_beside_it() -> None:
    """A response is the same whatever else is sampled with it, as far as the width of a panel allows."""
    x, weight = drawn(96, 16), drawn(50, 96, seed=1)
    whole = loops.product(x, weight)
    other = loops.product(torch.cat([x[:, :4], drawn(96, 12, seed=5)], 1), weight)
    assert whole[:, :4].equal(other[:, :4])


@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_few_rows(bias: bool) -> None:
    hidden, weight, added = drawn(5, 24), drawn(300, 24, seed=1), drawn(300, seed=2) if bias else None
    found = affine(hidden, weight, added)
    wanted = hidden.double() @ weight.double().t() + (added.double() if added is not None else 0)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [
    torch.arange(50, dtype=torch.bfloat16), torch.arange(50, dtype=torch.float64), torch.arange(100.0)[::2],
    torch.ones(1).expand(50),
], ids=["bfloat16", "float64", "strided", "expanded"])
def test_logits_with_a_bias_of_any_kind(bias: Tensor) -> None:
    hidden, weight = drawn(5, 24), drawn(50, 24, seed=1)
    torch.testing.assert_close(affine(hidden, weight, bias), hidden @ weight.t() + bias, check_dtype=False)
    learned = bias.clone().requires_grad_()
    affine(hidden, weight, learned).sum().backward()
    assert learned.grad is not None and (learned.grad == 5).all()


@pytest.mark.parametrize("columns", [1, 5, 16, 33])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_turned_norm(columns: int, offset: float) -> None:
    x, weight = drawn(3, 20, columns), drawn(20, seed=1)
    wanted = norm(x.double().mT, weight.double() + offset).mT
    torch.testing.assert_close(layer.norm_turned(x, weight, 1e-5, offset).double(), wanted, **TIGHT)


def test_turned_rotary_positions() -> None:
    x, angles = drawn(3, 8, 5), drawn(2, 5, 8, seed=1)
    wanted = turned_by(x.mT.double(), *angles.double())
    torch.testing.assert_close(layer.rotate_turned(x, *angles).double(), wanted, **TIGHT)


@pytest.mark.parametrize("width", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("repeat", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("window", [None, 1, 6, 40])
def test_attention_of_a_decoding_step(width: int, repeat: int, window: int | None, threads: int) -> None:
    """Rows of two groups of unequal size and unequal prompts, over more tokens than there is room for at first."""
    heads, rows, prompts = 2, 5, (37, 3)
    group, lengths = torch.tensor([0, 0, 0, 1, 1]), torch.tensor(prompts)
    prompt = drawn(2, heads, 2, max(prompts), width)
    steps = loops.BLOCK + 3
    query = drawn(steps, heads * repeat, rows, width, seed=1)
    key, value = drawn(2, steps, heads, rows, width, seed=2)
    cache = DecodeCache({0: (prompt[0], prompt[1])}, lengths, group)
    for at in range(steps):
        found = cache.attend(0, query[at], key[at], value[at], 0.3, window)
        cache.advance()
        if at not in (0, 4, loops.BLOCK - 1, loops.BLOCK, steps - 1):
            continue
        for row in range(rows):
            seen = [torch.cat([prompt[i, :, group[row], : lengths[group[row]]], x[: at + 1, :, row].transpose(0, 1)], 1)
                    .double()[:, -(window or 10**6) :] for i, x in enumerate((key, value))]
            q = query[at, :, row].double().view(heads, repeat, width)
            wanted = torch.softmax(0.3 * q @ seen[0].mT, -1) @ seen[1]
            torch.testing.assert_close(found[row].double(), wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("width", [16, 48])
def test_values_of_another_width_than_keys(width: int, off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_off", off)
    keys, values = drawn(2, 1, 3, 32), drawn(2, 1, 3, width, seed=1)
    cache = DecodeCache({0: (keys, values)}, torch.tensor([3]), torch.tensor([0, 0]))
    query, key, value = drawn(2, 2, 32, seed=2), drawn(2, 2, 32, seed=3), drawn(2, 2, width, seed=4)
    found = cache.attend(0, query, key, value, 0.2, None)
    for row in range(2):
        scores = query[:, row, None] @ torch.cat([keys[:, 0], key[:, row, None]], 1).mT * 0.2
        wanted = scores.softmax(-1) @ torch.cat([values[:, 0], value[:, row, None]], 1)
        torch.testing.assert_close(found[row], wanted[:, 0])


@pytest.mark.parametrize("columns", [1, 5, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "biases and norms of heads"])
def test_a_decoded_layer_before_and_after_its_attention(columns: int, more: bool, threads: int) -> None:
    width, height, inner = 8, 44, 83

    def normed(x: Tensor, by: layer.Norm) -> Tensor:
        return norm(x, by.weight.double() + by.offset)

    x, seen, (cos, sin) = drawn(height, columns), drawn(columns, 24, seed=1), drawn(2, columns, width, seed=2)
    before, between, *of_heads = (layer.Norm(drawn(size, seed=i), 1e-5, 0.5) for i, size in enumerate(
        (height, height, width, width)))
    linears = [layer.Linear(drawn(width * heads, height, seed=heads), drawn(width * heads) if more else None)
               for heads in (6, 3, 3)]
    out, gate, up, down = (drawn(*shape, seed=i) for i, shape in enumerate(
        ((height, 24), (inner, height), (inner, height), (height, inner))))
    bias = drawn(height, seed=9) if more else None
    parts = layer.Parts(before, linears, of_heads if more else [], layer.Linear(out, bias), between, gate, up, down)
    found = layer.before(x, parts, cos, sin)
    for i, (made, linear) in enumerate(zip(found, linears, strict=True)):
        exact = normed(x.double().mT, before) @ linear.weight.double().mT + (0 if linear.bias is None else linear.bias)
        exact = exact.unflatten(-1, (-1, width)).transpose(0, 1)
        if i < 2:
            exact = turned_by(normed(exact, of_heads[i]) if more else exact, cos.double(), sin.double())
        torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-4)
    middle = x.double().mT + seen.double() @ out.double().mT + (0 if bias is None else bias)
    states = normed(middle, between)
    exact = middle + (silu(states @ gate.double().mT) * (states @ up.double().mT)) @ down.double().mT
    after = layer.after(seen, x, parts)
    torch.testing.assert_close(after.double().mT, exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 47, 64, 65, 100, 128])
@pytest.mark.parametrize("size", [1, 24, 50, 301])
def test_logits_of_tens_of_rows(rows: int, size: int, threads: int) -> None:
    x, weight, bias = drawn(rows, 21), drawn(size, 21, seed=1), drawn(size, seed=2)
    exact = x.double() @ weight.double().mT
    torch.testing.assert_close(loops.logits(x, weight).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loops.logits(x, weight, bias).double(), exact + bias, rtol=1e-5, atol=1e-5)
    assert loops.logits(x[:1], weight).equal(loops.logits(x, weight)[:1])  # whatever rows are beside it


def test_a_vocabularys_logits_are_those_of_the_loop_where_they_are_not_differentiated() -> None:
    hidden, weight = drawn(40, 24), drawn(loops.WIDE, 24, seed=1)
    assert loops.projects(hidden, weight) and not loops.projects(hidden[:30], weight)
    assert not loops.projects(hidden.t().contiguous().t(), weight)
    assert affine(hidden, weight, None).equal(loops.logits(hidden, weight))
    affine(hidden, weight.requires_grad_(), None).sum().backward()
    assert weight.grad is not None


class Other(torch.nn.Linear):
    """A projection that somebody has made something of."""


PLACES = {"step": layer.Stack, **dict.fromkeys(("attend", "product"), loops),
          **dict.fromkeys(("before", "after", "norm_turned", "rotate_turned"), layer)}


@pytest.mark.parametrize("kind", ["off", "whole", "adapted"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_decoded_hidden_states_with_and_without_loops(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16, so that all loops take part."""
    called = set[str]()
    for name, place in PLACES.items():
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, real=real, name=name, **k: called.add(name) or real(*a, **k))
    monkeypatch.setattr(base, "_off", kind == "off")
    model = families.SUPPORTED[family](head_dim=16) if family != "qwen2" else families.SUPPORTED[family]()
    if kind == "adapted":
        for each in model.model.layers:
            each.self_attn.o_proj.__class__ = Other
    backbone = Backbone(model)
    assert turned_layers(backbone) == 2
    read = torch.randint(families.VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(decoded(backbone, read).double(), reference(model, read), atol=2e-5, rtol=2e-5)
    of_layer = {"off": set(), "whole": {"before", "after"}, "adapted": {"product", "norm_turned", "rotate_turned"}}
    attends = kind != "off" and loops.attends(model.model.layers[0].self_attn.head_dim)
    attention = {"off": set(), "whole": {"step"}, "adapted": {"attend"}}
    assert called == of_layer[kind] | (attention[kind] if attends else set())


def test_a_decoded_layer_under_somebody_elses_autocast() -> None:
    """Attention by torch's operators, as heads of 8 are no whole vectors, in 16 bits."""
    model = families.SUPPORTED["llama"](head_dim=8)
    backbone = Backbone(model)
    assert turned_layers(backbone) == 2
    read = torch.randint(families.VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = decoded(backbone, read)
    torch.testing.assert_close(found.double(), reference(model, read), atol=0.2, rtol=0.1)


# -------------------------------------------------------------------------------------------------- rows of logits


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_many_stretches_are_exact_whatever_the_logits_offset(form: str, offset: float) -> None:
    """Of 50,000 logits, a dozen stretches whose sums are added in double."""
    s, t = (2 * drawn(3, 50_001, seed=seed) for seed in (0, 1))
    s[1, 7], s[2, 8], t[2, 8] = 24.0, -torch.inf, -torch.inf
    s, t, tokens = s + offset, t + offset, torch.tensor([1, 40_000, 50_000])
    found = []
    for student, teacher in ((s, t), (s.double(), t.double())):
        student = student.clone().requires_grad_()
        with kernels.off() if student.dtype == torch.float64 else nullcontext():
            dist = TokenDist(student, tokens)
            value = FORMS[form](dist, TokenDist(teacher, tokens))
            value.sum().backward()
            with torch.no_grad():
                entropy = dist.entropy()
        found.append((value.detach().double(), student.grad.double(), entropy.double()))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 + 1.2e-7 * offset)  # float32 holds z and lse


# -------------------------------------------------------------------------------------------------- packed passes

PASSES: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "one prompt": ([(5, 6, 7)] * 2, [(1, 2, 3, 4), (2, 3)]),
    "beyond a stripe and a block": ([tuple(range(70))] * 3, [tuple(range(n)) for n in (2, 40, 101)]),
    "a common beginning": ([(9, 8, 7, 6), (9, 8, 7, 6), (9, 8, 3, 2, 1)], [(1, 2, 3), (2, 2), (1, 1, 1, 1, 1)]),
    "one prompt begins the other": ([(9, 8), (9, 8, 3)], [(1, 2, 3), (2, 2, 5)]),
    "responses of one token": ([(9, 8, 1), (9, 8, 1)], [(1,), (2,)]),
}


def seen_by(packed: Any) -> Tensor:
    """Which tokens of a packed pass each one sees, from its groups: (T, T)."""
    tokens = packed.token_ids.shape[0]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)

    def run(start: int, length: int, before: list[range]) -> None:
        for at in range(start, start + length):
            seen[at, start : at + 1] = True
            for tokens_before in before:
                seen[at, list(tokens_before)] = True

    run(0, packed.common, [])
    for group in packed.groups:
        run(group.start, group.prompt, [range(packed.common)])
        at = group.start + group.prompt
        for length in group.responses:
            run(at, length, [range(packed.common), range(group.start, group.start + group.prompt)])
            at += length
    return seen


@pytest.mark.parametrize("case", PASSES)
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 16), (9, 3, 64), (2, 2, 80)])
def test_attention_of_a_packed_pass_and_its_gradient(case: str, heads: int, kv_heads: int, width: int, threads: int
                                                     ) -> None:
    packed = pack(*PASSES[case])
    tokens = packed.token_ids.shape[0]
    inputs = [drawn(tokens, n, width, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads))]

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return Segments(packed).attend(0, *(x.transpose(0, 1) for x in (query, key, value)), 0.4, None)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * 0.4
        probs = scores.masked_fill(~seen_by(packed), -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", probs, value)

    with mock.patch.object(passes, "attend_pass", wraps=passes.attend_pass) as called:
        found = ours(attended, *inputs)
    assert called.called
    for a, b in zip(found, exact(dense, *inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5 * float(b.abs().max()))


def test_a_packed_pass_reads_queries_and_keys_in_any_order_of_memory() -> None:
    packed = pack(*PASSES["a common beginning"])
    shapes = [(n, packed.token_ids.shape[0], 16) for n in (4, 2, 2)]
    plain = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    other = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain]
    found = [Segments(packed).attend(0, *inputs, 0.4, None) for inputs in (plain, other)]
    assert found[0].equal(found[1])


@pytest.mark.parametrize("window, looped", [(None, True), (7, True), (6, False)])
def test_a_window_that_hides_something_is_left_to_torch(window: int | None, looped: bool) -> None:
    packed = pack([(5, 6, 7, 8)], [(1, 2, 3, 4)])  # the last input stands at 6 and sees 7 tokens
    query, key = drawn(4, 7, 16), drawn(2, 7, 16, seed=1)
    with mock.patch.object(passes, "attend_pass", wraps=passes.attend_pass) as called:
        found = Segments(packed).attend(0, query, key, key, 0.4, window)
    assert called.called is looped
    with kernels.off():
        torch.testing.assert_close(found, Segments(packed).attend(0, query, key, key, 0.4, window))


# ---------------------------------------------------------------------------------------------------- compiling


def asked(cache: Path, before: str = "pass", x: str = "torch.ones(1)", **environment: str) -> str:
    """Whether another process finds loops, about which it says nothing."""
    code = f"import torch; from selftaught.kernels import loops; x = {x}; {before}; print(loops.usable(x))"
    told = {**os.environ, "SELFTAUGHT_CACHE": str(cache), **environment}
    found = subprocess.run([sys.executable, "-c", code], env=told, check=True, capture_output=True, text=True)
    assert found.stderr == ""
    return found.stdout.strip()


def test_they_are_compiled_once_and_read_again_without_a_compiler_s_help(tmp_path: Path) -> None:
    assert asked(tmp_path) == "True"
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "loops").iterdir()}
    assert sorted(path.suffix for path in made) == [".sha256", ".so"]
    assert asked(tmp_path) == "True"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "loops").iterdir()} == made


@pytest.mark.parametrize("environment", [
    {"CC": "no-such-compiler"}, {"CC": "false"}, {"CC": "gcc '"}, {"CC": " "}, {"PATH": "/nowhere"},
    {"SELFTAUGHT_LOOPS": "0"},
], ids=["unknown", "failing", "no command", "blank", "none", "switched off"])
def test_without_a_compiler_there_are_none_and_nothing_is_said(environment: dict[str, str], tmp_path: Path) -> None:
    assert asked(tmp_path, **environment) == "False"


def test_each_kind_of_processor_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFTAUGHT_CACHE", str(tmp_path))
    first = next(compiled.libraries())._name
    monkeypatch.setattr(compiled, "kind", lambda: "another")
    assert first != next(compiled.libraries())._name
    assert len(list((tmp_path / "loops").glob("*.so"))) == 2


def test_where_the_cache_cannot_be_written_they_are_this_process_s_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert asked(tmp_path / "file", TMPDIR=str(tmp_path)) == "True"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("left", [0.0, 0.5, 1.0], ids=["nothing", "half", "all but its checksum"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, left: float) -> None:
    assert asked(tmp_path) == "True"
    (made,) = (tmp_path / "loops").glob("*.so")
    kept = sorted((tmp_path / "loops").iterdir())
    whole = made.read_bytes()
    if left == 1.0:
        made.with_suffix(".sha256").unlink()
    os.truncate(made, int(left * len(whole)))  # half of it can be loaded, and ends the process as soon as it is used
    assert asked(tmp_path) == "True"
    assert sorted((tmp_path / "loops").iterdir()) == kept and made.read_bytes() == whole


def test_a_compiler_that_hangs_is_ended_once_with_all_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "hangs"
    command.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\nsleep 600 &\necho $! >> {tmp_path}/began\nwait\n")
    command.chmod(0o755)
    monkeypatch.setenv("CC", str(command))
    monkeypatch.setenv("SELFTAUGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "SECONDS", 1.0)
    assert list(compiled.libraries()) == []
    (began,) = (tmp_path / "began").read_text().split()
    until = time.monotonic() + 60.0
    while _runs(int(began)):  # a signal is sent at once, and acted on when the system comes to it
        assert time.monotonic() < until
        time.sleep(0.01)


def _runs(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("before", [
    "torch.inference_mode().__enter__()", "torch.set_default_dtype(torch.float64)", "torch.device('meta').__enter__()",
])
def test_the_first_to_ask_may_stand_anywhere(before: str, tmp_path: Path) -> None:
    assert asked(tmp_path, before, x="torch.ones(1, dtype=torch.float32, device='cpu')") == "True"


def test_tensors_without_memory_of_their_own_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not loops.usable(torch.ones(1))


@pytest.mark.parametrize(("module", "name"), [
    (loops, "norm"), (loops, "gate_backward"), (loops, "product"), (loops, "attend"), (passes, "attend_pass_backward"),
    *([(passes, "backward")] if passes.take_layers() else [])], ids=str)
def test_a_loop_that_counts_wrong_is_found_out(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(module, name)

    def wrong(*given: Any, **more: Any) -> Any:
        found = real(*given, **more)
        return found * 1.001 if isinstance(found, Tensor) else (*found[:-1], found[-1] * 1.001)

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(RuntimeError, match=r"is \S+ from what it should be"):
        probe.check()
    monkeypatch.setattr(loops, "_found", None)
    try:
        with pytest.warns(UserWarning, match=r"the compiled loops are not used.*from what it should be"):
            assert not loops.usable(torch.ones(1))
    finally:
        monkeypatch.undo()
        assert loops._load()
