"""Kernels over rows of logits against torch's operators in float64.

Those of a GPU on one, or by Triton's interpreter where there is none; there also those of a CPU.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if (sys.platform, platform.machine()) != ("linux", "x86_64"):  # there it is a tool of development
    pytest.importorskip("triton", reason="the kernels' interpreter comes with Triton")

from selftaught import TokenBatch, chunked_objective, kernels, objective, tensors, vocabulary
from selftaught.kernels import rows
from selftaught.loss import chunked, clipped_kl, divergence, js, kl, kl_to_barycenter, with_tail
from selftaught.vocabulary import TokenDist

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's -inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 2 * rows.BLOCK + 37 if DEVICE == "cuda" else 201  # no multiple of a block


@pytest.fixture(autouse=True, params=["triton", "loops"] if DEVICE == "cpu" else ["triton"])
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[None]:
    """Several blocks to a row, several logits of each to a lane, and tensors of the CPU read by the interpreter.

    And the compiled loops of a CPU, on the same rows.
    """
    if request.param == "loops":
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            pytest.skip("no C compiler")
        assert kernels.usable(torch.ones(1, 1))
        yield
    elif DEVICE == "cpu":
        for name, number in (("BLOCK", 128), ("WARPS", 1), ("VECTOR", 1)):  # 32 lanes
            monkeypatch.setattr(rows, name, number)
        with kernels.interpreted():
            yield
    else:
        yield


def logits(n: int, std: float, seed: int) -> Tensor:
    """Numbers that float32 holds too, in float64."""
    drawn = std * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn.double().to(DEVICE)


def pair(std: float, banned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher (float64), tokens; the last row's sides are equal. `banned`: tokens impossible under both."""
    s, t = logits(6, std, 0), (logits(6, std, 1) + 40.0).float().double()
    t[-1] = s[-1]
    if banned:
        s[:, 5:9] = t[:, 5:9] = -torch.inf
        s[:, -2:] = t[:, -2:] = -torch.inf
        s[0, :100] = t[0, :100] = -torch.inf  # a whole block and more at the start
    return s, t, torch.tensor([V // 2, 3, 100, 120, V - 3, 110], device=DEVICE)


FORMS: dict[str, Callable[[Any, Any], Tensor]] = {
    "kl(T, S)": lambda s, t: kl(t, s),
    "kl(S, T)": lambda s, t: kl(s, t),
    "js(T, S, .3)": lambda s, t: js(t, s, 0.3),
    "js(S, T, .3)": lambda s, t: js(s, t, 0.3),
    "clipped": lambda s, t: clipped_kl(t, s, 0.002),
    "clipped at 1": lambda s, t: clipped_kl(t, s, 1.0),
    "top-k": lambda s, t: divergence("js", *reversed(with_tail(7, s, t))),
    "top-k, kl(S, T)": lambda s, t: kl(*with_tail(7, s, t)),
    "sampled": lambda s, t: (t.at_sampled - s.at_sampled) ** 2,
}


@pytest.mark.parametrize("banned", [False, True], ids=["all", "banned"])
@pytest.mark.parametrize(("std", "temperature"), [(0.1, 1.0), (3.0, 1.7), (30.0, 1.0)])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_torch_in_float64(form: str, temperature: float, std: float,
                                                            banned: bool) -> None:
    s, t, tokens = pair(std, banned)
    weight = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.0], device=DEVICE)

    def of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.clone().requires_grad_()
        value = FORMS[form](TokenDist(student, tokens, temperature), TokenDist(teacher, tokens, temperature))
        (value * weight.to(value.dtype)).sum().backward()
        assert student.grad is not None
        return value.detach(), student.grad

    with kernels.off():
        value, gradient = of(s, t)
    found, grad = of(s.float(), t.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), value, rtol=3e-5, atol=1e-5)
    room = 5e-5 if "top-k" in form else 1e-6  # buckets' gradients are differences of what is as large as the KL
    torch.testing.assert_close(grad.double(), gradient, rtol=3e-4, atol=room * max(1.0, std))
    assert (grad[3] == 0).all()  # nobody weighs it


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
@pytest.mark.parametrize("form", FORMS)
def test_a_student_that_is_no_distribution_has_no_finite_gradient(form: str, wrong: float) -> None:
    """So that its step is refused, as it is by torch's operators."""
    s, t, tokens = pair(3.0)
    s[0, 7] = wrong
    student = s.float().requires_grad_()
    FORMS[form](TokenDist(student, tokens), TokenDist(t.float(), tokens)).sum().backward()
    assert student.grad is not None and not student.grad[0].isfinite().all() and student.grad[1:].isfinite().all()


@pytest.mark.parametrize("std", [0.1, 30.0])
def test_equal_sides_have_no_divergence_and_no_gradient_at_all(std: float) -> None:
    s, _, tokens = pair(std)
    for form in ("kl(T, S)", "kl(S, T)"):
        student = s.float().requires_grad_()
        value = FORMS[form](TokenDist(student, tokens), TokenDist(s.float(), tokens))
        value.sum().backward()
        assert (value == 0).all() and student.grad is not None and student.grad.abs().max() < 1e-7


def test_statistics_are_those_of_the_distribution() -> None:
    s, _, tokens = pair(30.0, banned=True)
    exact = (s / 1.3).log_softmax(-1)
    found = TokenDist(s.float(), tokens, 1.3).statistics
    torch.testing.assert_close(found.lse.double(), (s / 1.3).logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logp.double(), exact.gather(-1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-5)
    entropy = -(exact.exp() * exact.clamp(min=-1e4)).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-6)


def shapes_of_rows() -> Iterator[tuple[str, Tensor]]:
    """Name and logits of rows whose lanes differ: in length, in maximum, in having any mass at all."""
    block = rows.BLOCK

    def drawn(size: int, std: float = 3.0) -> Tensor:
        z = std * torch.randn(2, size, generator=torch.Generator().manual_seed(size), dtype=torch.float32)
        return z.double().to(DEVICE)

    yield "shorter than a lane's stride", drawn(13)
    yield "shorter than a block", drawn(block - 5)
    last = drawn(3 * block + 3)
    last[:, -1] += 50.0
    yield "maximum in the last block", last
    first = drawn(3 * block + 3)
    first[:, 0] += 50.0
    yield "maximum in the first lane", first
    one = torch.full((2, 2 * block + 9), -torch.inf, dtype=torch.float64, device=DEVICE)
    one[0, block + 1], one[1, -1] = -7.0, 300.0
    yield "all but one impossible", one
    wide = drawn(2 * block + 9)
    wide[:, ::2] += 1e4
    wide[:, 1::2] -= 1e4
    yield "spread of 2e4", wide
    rising = torch.arange(2 * block + 9, device=DEVICE, dtype=torch.float64).repeat(2, 1)
    rising[1] = rising[1].flip(0)
    yield "every block above or below the one before", rising / 8


def test_lanes_of_any_content_are_joined() -> None:
    for name, drawn in shapes_of_rows():
        z = drawn.float().double()  # what float32 holds too
        other = (z.flip(0) / 2 + torch.arange(z.shape[1], device=DEVICE) % 5).float().double()
        other = torch.where(z.isfinite() & other.isfinite(), other, z)
        tokens = z.argmax(-1)
        p, q = TokenDist(z.float(), tokens), TokenDist(other.float(), tokens)
        logp, logq = z.log_softmax(-1), other.log_softmax(-1)
        terms = torch.where(logp.exp() > 0, logp.exp() * (logp - logq), 0.0)
        close = {"rtol": 2e-5, "atol": 2e-5, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(kl(p, q).double(), terms.sum(-1), **close)
        for dist, exact, logits in ((p, logp, z), (q, logq, other)):
            entropy = -torch.where(exact.exp() > 0, exact.exp() * exact, 0.0).sum(-1)
            for found in (dist.statistics, TokenDist(dist.raw, tokens).statistics):  # on the way of the KL, and alone
                torch.testing.assert_close(found.lse.double(), logits.logsumexp(-1), **close)
                torch.testing.assert_close(found.entropy.double(), entropy, **close)
                room = {**close, "atol": 2e-5 + 1e-7 * float(logits.amax().abs())}  # float32 holds z and lse
                torch.testing.assert_close(found.logp.double(), exact.gather(-1, tokens[:, None])[:, 0], **room)


def test_a_token_that_is_impossible_for_the_student_alone_costs_infinity_and_teaches_nobody_without_weight() -> None:
    s, t, tokens = pair(3.0)
    s[1, 7] = -torch.inf
    student = s.float().requires_grad_()
    value = kl(TokenDist(t.float(), tokens), TokenDist(student, tokens))
    assert value[1] == torch.inf and value[[0, 2, 3, 4, 5]].isfinite().all()
    torch.where(torch.arange(6, device=DEVICE) == 1, 0.0, value).sum().backward()
    assert student.grad is not None and student.grad.isfinite().all() and (student.grad[1] == 0).all()


def test_a_tail_far_below_the_top_keeps_its_mass_and_gradient() -> None:
    z = torch.zeros(1, V, dtype=torch.float64, device=DEVICE)
    z[:, :7] = 400.0 + torch.arange(7, device=DEVICE)
    tokens = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    student = z.float().requires_grad_()
    buckets, _ = with_tail(7, TokenDist(student, tokens), TokenDist(z.float(), tokens))
    expected = torch.logsumexp(z[:, 7:], -1) - torch.logsumexp(z, -1)
    torch.testing.assert_close(buckets[:, 7].double(), expected, rtol=1e-6, atol=0)
    buckets[:, 7].sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad[:, 7:].sum(), torch.ones((), device=DEVICE), rtol=1e-5, atol=0)


def test_a_tail_that_is_impossible_leaves_the_tops_gradient_finite() -> None:
    s, _, tokens = pair(3.0)
    s[:, 7:] = -torch.inf
    student = s.float().requires_grad_()
    buckets, _ = with_tail(7, TokenDist(student, tokens), TokenDist(s.float(), tokens))
    assert (buckets[:, 7] == -torch.inf).all()
    buckets[:, :7].max(-1).values.sum().backward()
    assert student.grad is not None
    exact = torch.nn.functional.one_hot(s.argmax(-1), V) - s.softmax(-1)
    torch.testing.assert_close(student.grad.double(), exact, rtol=1e-5, atol=1e-6)


def test_lanes_whose_logits_are_all_among_the_top_leave_the_tail_to_the_others() -> None:
    s, t, tokens = pair(3.0)
    lanes = rows._shape(rows.BLOCK)["LANES"]
    s[:, 5::lanes] += 60.0
    t[:, 5::lanes] -= 60.0  # the teacher's tail lies far above its top
    k = s[0, 5::lanes].numel()

    def of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        student = student.clone().requires_grad_()
        own, theirs = with_tail(k, TokenDist(student, tokens), TokenDist(teacher, tokens))
        (own[:, :k].sum() - 2 * own[:, k].sum()).backward()
        assert student.grad is not None
        return own.sort(-1).values, theirs.sort(-1).values, student.grad

    with kernels.off():
        exact = of(s, t)
    for found, wanted in zip(of(s.float(), t.float()), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=3e-5, atol=3e-5)


def test_tokens_may_be_strided_and_one_that_is_none_is_no_other_rows() -> None:
    s, _, _ = pair(3.0)
    pairs = torch.randint(V, (6, 2), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    student = s.float().requires_grad_()
    found = TokenDist(student, pairs[:, 0]).at_sampled
    torch.testing.assert_close(found.double(), s.log_softmax(-1).gather(-1, pairs[:, :1])[:, 0], rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert student.grad is not None
    exact = torch.nn.functional.one_hot(pairs[:, 0], V) - s.softmax(-1)
    torch.testing.assert_close(student.grad.double(), exact, rtol=1e-5, atol=1e-6)
    for wrong in (-100, V):
        assert TokenDist(s.float(), torch.full((6,), wrong, device=DEVICE)).at_sampled.isnan().all()


SHARE = [0.0, 0.1, 0.5, 0.15, 0.9, 1.0]


@pytest.mark.parametrize("floor", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("banned", [False, True], ids=["all", "banned"])
@pytest.mark.parametrize(("std", "temperature"), [(0.1, 1.0), (3.0, 1.7), (30.0, 1.0)])
def test_a_barycenter_is_that_of_torch_in_float64(temperature: float, std: float, banned: bool, floor: float) -> None:
    s, t, tokens = pair(std, banned)
    r = (t.flip(-1) if not banned else t + torch.arange(V, device=DEVICE) % 7).float().double()
    share, weight = (torch.tensor(x, device=DEVICE) for x in (SHARE, [1.0, -2.0, 0.5, 0.0, 3.0, 1.0]))
    if floor:  # what one side alone holds to be impossible; without a floor that costs infinity
        t[1, 11] = r[2, 12] = t[4, 13] = r[4, 13] = -torch.inf

    def of(student: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        student = student.clone().requires_grad_()
        own, teacher, reference = (TokenDist(x, tokens, temperature) for x in (student, *others))
        value = kl_to_barycenter(own, teacher, reference, share.to(student.dtype), floor)
        (value * weight.to(value.dtype)).sum().backward()
        assert student.grad is not None
        return value.detach(), student.grad, js(reference, teacher, floor=floor)

    with kernels.off():
        exact = of(s, t, r)
    found = of(s.float(), t.float(), r.float())
    assert all(x.isfinite().all() for x in exact)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=3e-4, atol=2e-6 * max(1.0, std))
    torch.testing.assert_close(found[2].double(), exact[2], rtol=3e-5, atol=1e-5)
    assert (found[1][3] == 0).all()  # nobody weighs it


def test_a_barycenter_far_below_both_sides_keeps_its_mass() -> None:
    """T and R that share next to nothing: their product underflows everywhere, its logarithm does not."""
    s, _, tokens = pair(1.0)
    t, r = (torch.zeros(6, V, dtype=torch.float64, device=DEVICE) for _ in range(2))
    t[:, ::2], r[:, 1::2] = 600.0, 600.0
    share = torch.full((6,), 0.5, device=DEVICE)
    found, exact = (kl_to_barycenter(*(TokenDist(x.to(kind), tokens) for x in (s, t, r)), share.to(kind))
                    for kind in (torch.float32, torch.float64))
    assert exact.isfinite().all()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_a_student_without_a_distribution_is_at_no_distance_from_a_barycenter(wrong: float) -> None:
    s, t, tokens = pair(3.0)
    s[0, 7] = wrong
    student, share = s.float().requires_grad_(), torch.full((6,), 0.1, device=DEVICE)
    teacher, reference = TokenDist(t.float(), tokens), TokenDist(t.float().flip(-1), tokens)
    kl_to_barycenter(TokenDist(student, tokens), teacher, reference, share, 1e-8).sum().backward()
    assert student.grad is not None and not student.grad[0].isfinite().all() and student.grad[1:].isfinite().all()


@pytest.mark.parametrize("taught", range(4), ids=["student", "teacher", "reference", "share"])
def test_whatever_of_a_barycenter_is_to_be_taught_gets_its_gradient(taught: int) -> None:
    s, t, tokens = pair(1.0)
    given = [s, t, t.flip(-1), torch.tensor(SHARE, dtype=torch.float64, device=DEVICE) / 2 + 0.1]

    def of(*given: Tensor) -> Tensor:
        given = tuple(x.clone().requires_grad_(i == taught) for i, x in enumerate(given))
        kl_to_barycenter(*(TokenDist(x, tokens) for x in given[:3]), given[3], 1e-3).sum().backward()
        found = given[taught].grad
        assert found is not None
        return found

    with kernels.off():
        exact = of(*given)
    assert (exact != 0).any()
    torch.testing.assert_close(of(*(x.float() for x in given)).double(), exact, rtol=3e-4, atol=3e-6)


def test_one_share_of_a_barycenter_is_that_of_every_token() -> None:
    s, t, tokens = pair(3.0)
    sides = [TokenDist(x.float(), tokens) for x in (s, t, t.flip(-1))]
    one, many = (kl_to_barycenter(*sides, torch.full((n,), 0.3, device=DEVICE), 1e-8) for n in (1, 6))
    assert one.equal(many)


@pytest.mark.parametrize("floor", [1e-3, 1e-2])
def test_js_of_raised_sides_has_its_gradient(floor: float) -> None:
    p, q = (logits(2, 2.0, seed)[:, :40].cpu() for seed in (0, 1))

    def raised(p: Tensor, q: Tensor) -> Tensor:
        return js(p.log_softmax(-1), q.log_softmax(-1), 0.3, floor)

    assert (p.log_softmax(-1).exp() < floor).any()
    assert torch.autograd.gradcheck(raised, (p.requires_grad_(), q.requires_grad_()))


METHODS: dict[str, dict[str, Any]] = {
    "demopsd of the vocabulary": {"top_k": None},
    "grpo": {}, "opsd": {"clip": None}, "sdft": {}, "sdpo": {"top_k": 9}, "gkd": {"divergence": "js", "weight": 0.3},
    "sdpg": {"alpha": 0.1, "beta": 0.5, "beta_warmup": 0}, "demopsd": {"top_k": 9}, "dopd": {"top_k": 9}, "rlsd": {},
}


def emulate_wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU multiplies, 16 bits into float32, on a CPU: the same numbers, so that the path around it is tested."""

    def is_wide(x: Tensor, weight: Tensor) -> bool:
        return x.dtype == weight.dtype and x.dtype.itemsize == 2

    def into_wide(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        product = a.float() @ b.float()
        return product if out is None else out.add_(product)

    for module in (tensors, vocabulary, chunked):
        monkeypatch.setattr(module, "is_wide", is_wide)
    monkeypatch.setattr(tensors, "_into_wide", into_wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_chunks_is_its_dense_reference(name: str, dtype: torch.dtype,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "GATHERED", 2)  # of four chunks, the last one short
    if DEVICE == "cpu":
        emulate_wide_products(monkeypatch)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(dtype)

    n, h = 20, 16
    views = ("student", "teacher", "reference", "privileged_student")
    hidden = {view: normal(n, h).to(DEVICE) for view in views}
    head = normal(V, h, std=1.0).to(DEVICE)
    tokens = torch.randint(V, (n,), generator=generator).to(DEVICE)
    batch = TokenBatch(tokens=tokens, sequence_ids=torch.arange(n, device=DEVICE) // 5,
                       reward=torch.tensor([1.0, 0.0, 0.0, 1.0], device=DEVICE),
                       group=torch.tensor([0, 0, 1, 1], device=DEVICE))
    fields = METHODS[name]
    exact = {view: hidden[view].double().requires_grad_(view == "student") for view in views}
    exact_head = head.double().requires_grad_()
    with kernels.off():
        dense = objective(name.split()[0], batch, {v: x @ (exact_head if v == "student" else exact_head.detach()).t()
                                        for v, x in exact.items()}, **fields)
        dense.loss.backward()
    hidden["student"].requires_grad_()
    weight = head.clone().requires_grad_()
    heads = {view: weight if view == "student" else head for view in views}
    out = chunked_objective(name.split()[0], batch, hidden, heads, chunk=6, **fields)
    out.loss.backward()
    assert hidden["student"].grad is not None and weight.grad is not None and weight.grad.dtype == dtype
    low = dtype != torch.float32
    torch.testing.assert_close(out.loss.double(), dense.loss.detach(), rtol=1e-4, atol=1e-5)
    for found, wanted in ((hidden["student"].grad, exact["student"].grad), (weight.grad, exact_head.grad)):
        assert wanted is not None
        assert (found.double() - wanted).norm() <= (1e-2 if low else 1e-4) * wanted.norm()


def test_the_heads_gradient_of_16_bits_is_added_in_float32_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        emulate_wide_products(monkeypatch)
    monkeypatch.setattr(chunked, "GATHERED", 2)
    generator = torch.Generator().manual_seed(5)
    hidden, head = (torch.randn(k, 16, generator=generator).bfloat16().to(DEVICE) for k in (20, V))
    tokens = torch.randint(V, (20,), generator=generator).to(DEVICE)
    batch = TokenBatch(tokens, torch.arange(20, device=DEVICE) // 5, torch.tensor([1.0, 0.0, 0.0, 1.0], device=DEVICE),
                       torch.tensor([0, 0, 1, 1], device=DEVICE))
    before = torch.randn(V, 16, generator=generator).to(DEVICE)
    found = {}
    for chunk in (6, 20):
        student, weight, wide = hidden.clone().requires_grad_(), head.clone().requires_grad_(), before.clone()
        chunked_objective("grpo", batch, {"student": student}, {"student": weight}, chunk=chunk,
                          head_grad=wide).loss.backward()
        assert weight.grad is None and student.grad is not None
        found[chunk] = wide - before
    gap = (found[6] - found[20]).norm() / found[20].norm()
    assert gap < 1e-5  # however many chunks: had it been summed in bfloat16, some 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_are_not_lost_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each below 2^-24, the least that float16 tells from 0."""
    if DEVICE == "cpu":
        emulate_wide_products(monkeypatch)
    generator = torch.Generator().manual_seed(7)
    hidden = {view: torch.randn(20, 16, generator=generator).to(dtype).to(DEVICE) for view in ("student", "teacher")}
    head = (0.3 * torch.randn(V, 16, generator=generator)).to(dtype).to(DEVICE)
    batch = TokenBatch(torch.zeros(20, dtype=torch.int64, device=DEVICE), torch.arange(20, device=DEVICE) // 5)
    found = []
    for kind in (torch.float64, dtype):
        weight = head.to(kind).requires_grad_()
        states = {view: x.to(kind).requires_grad_(view == "student") for view, x in hidden.items()}
        wide = torch.zeros(V, 16, device=DEVICE, dtype=torch.float32 if kind == dtype else kind)
        with kernels.off():
            chunked_objective("sdft", batch, states, {"student": weight, "teacher": head.to(kind)}, skip=0, chunk=6,
                              reduction="constant", length=10**6, head_grad=wide).loss.backward()
        found.append(wide.double())
    assert found[0].abs().max() < 2.0**-20 and (found[1] - found[0]).norm() < 1e-2 * found[0].norm()


def test_a_frozen_head_takes_nothing_and_leaves_the_loss_free_to_be_scaled() -> None:
    hidden, head = torch.randn(4, 16, device=DEVICE).requires_grad_(), torch.randn(V, 16, device=DEVICE)
    batch = TokenBatch(torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.arange(4, device=DEVICE) // 2,
                       torch.tensor([1.0, 0.0], device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE))
    wide = torch.zeros(V, 16, device=DEVICE)
    out = chunked_objective("grpo", batch, {"student": hidden}, {"student": head}, head_grad=wide)
    (2 * out.loss).backward()
    assert hidden.grad is not None and (hidden.grad != 0).any() and (wide == 0).all()
    kept = vars(out.loss.grad_fn.grads)  # type: ignore[union-attr]
    assert not kept.keys() & {"weights", "states"}  # which may be a float32 copy of the head


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from selftaught.kernels import rows

def kind(name):
    if name in ("tokens_ptr", "top_ptr"): return "*i64"
    if name == "mask_ptr": return "*u8"
    if name.endswith("_ptr"): return "*fp32"
    return "i32" if name in ("size", "k") or name.endswith("stride") else "fp32"

kinds = [{"KIND": kind} for kind in ("kl_to", "kl_from", "js", "clipped")]
for kernel, constants in [
    (rows._statistics, {}), (rows._buckets, {}), (rows._kl, {}), (rows._js, {}), (rows._clipped, {}), (rows._blend, {}),
    (rows._sampled_gradient, {}), (rows._blend_gradient, {}), (rows._buckets_gradient, {"FEW": 256}),
    *((rows._gradient, kind) for kind in kinds)]:
    names = kernel.arg_names
    shape = rows._shape(rows.BLOCK)
    constants = {**constants, **{name: shape[name] for name in ("BLOCK", "LANES") if name in names}}
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    source = ASTSource(fn=kernel, signature=signature,
                       constexprs={(names.index(name),): value for name, value in constants.items()},
                       attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                              if name == "size" or name.endswith(("_ptr", "stride"))})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": rows.WARPS})
    assert "st.global" in built.asm["ptx"] and built.asm["cubin"], kernel
    loops = [loop[0] for loop in re.finditer(r"^(\\$L\\w+):.*?\\bbra[^;]*\\1;", built.asm["ptx"], re.S | re.M)]
    over_row = [loop for loop in loops if re.search(r"ld[.]global[^;]*v4", loop)]
    assert over_row and not any("bar.sync" in loop for loop in over_row), f"{kernel}: warps wait for one another"
print("built")
"""


def test_the_kernels_compile_for_a_hopper_gpu_without_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("built"), done.stderr[-2000:]


def test_kernels_that_count_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rows.check(torch.device(DEVICE))
    right = rows.gradient
    monkeypatch.setattr(rows, "gradient", lambda *args, **more: 1.01 * right(*args, **more))
    with pytest.raises(RuntimeError, match=r"its gradient is .* from what it should be"):
        rows.check(torch.device(DEVICE))
