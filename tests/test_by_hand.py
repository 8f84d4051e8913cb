"""Divergences with gradients by hand, against autograd through log-probs in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selftaught import kernels
from selftaught.loss import by_hand, clipped_kl, divergence, js, kl, with_tail
from selftaught.loss.fused import Distribution
from selftaught.vocabulary import TokenDist

V, K = 40, 7
Form = Callable[[Distribution, Distribution], Tensor]
FORMS: dict[str, Form] = {
    "kl(T, S)": lambda s, t: kl(t, s),
    "kl(S, T)": lambda s, t: kl(s, t),
    "clipped, tight": lambda s, t: clipped_kl(t, s, 0.01),
    "clipped, loose": lambda s, t: clipped_kl(t, s, 0.5),
    "js": lambda s, t: js(t, s),
    "js of the student, .1": lambda s, t: js(s, t, 0.1),
    "top-k, js": lambda s, t: divergence("js", *reversed(with_tail(K, s, t))),
    "top-k, kl(S, T)": lambda s, t: kl(*with_tail(K, s, t)),
}


def logits(case: str) -> tuple[Tensor, Tensor]:
    """Of student and teacher, in float64."""
    s, t = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if case == "loud":
        s, t = 30 * s, 30 * t
    elif case == "equal":
        t = s.clone()
    elif case == "banned by both":
        s[:, 3], t[:, 3] = -math.inf, -math.inf
    return s, t


def dense(form: Form, s: Tensor, t: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The form of log-probs, without anything by hand, and its gradient."""
    s = s.clone().requires_grad_()
    both = [(x / temperature).log_softmax(-1) for x in (s, t)]
    if form in (FORMS["top-k, js"], FORMS["top-k, kl(S, T)"]):
        top = both[0].detach().topk(K).indices
        both = [torch.cat([x.gather(-1, top), x.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)], -1)
                for x in both]
        value = js(both[1], both[0]) if form is FORMS["top-k, js"] else kl(both[0], both[1])
    else:
        value = form(both[0], both[1])
    return value.detach(), torch.autograd.grad((value * weight).sum(), s)[0]


@pytest.fixture(autouse=True)
def by_torchs_operators() -> Iterator[None]:
    """As where there are no kernels."""
    with kernels.off():
        yield


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["ordinary", "loud", "equal", "banned by both"])
@pytest.mark.parametrize("name", FORMS)
def test_value_and_gradient_are_those_of_autograd_also_of_a_graph_that_is_kept(
    name: str, case: str, dtype: torch.dtype, temperature: float
) -> None:
    s, t = logits(case)
    weight = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.25], dtype=dtype)
    value, gradient = dense(FORMS[name], s, t, weight.double(), temperature)
    tokens = torch.arange(5)
    student = s.to(dtype).requires_grad_()
    dists = TokenDist(student, tokens, temperature), TokenDist(t.to(dtype), tokens, temperature)
    found = FORMS[name](*dists)
    exact = {"atol": 1e-11, "rtol": 1e-11} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(found.detach().double(), value, **exact)
    for keep in (True, True, False):
        (ours,) = torch.autograd.grad((found * weight).sum(), student, retain_graph=keep)
        torch.testing.assert_close(ours.double(), gradient, **exact)
    if case == "equal" and "top-k" not in name:
        assert (found.detach().abs() < 1e-7).all() and (name[0] != "k" or (found == 0).all())
    for dist, z in zip(dists, (s, t), strict=True):
        logp = (z / temperature).log_softmax(-1)
        torch.testing.assert_close(dist.at_sampled.detach().double(), logp.gather(-1, tokens[:, None])[:, 0], **exact)
        with torch.no_grad():
            plain = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
            torch.testing.assert_close(dist.entropy().double(), plain, **exact)


@pytest.mark.parametrize("name", FORMS)
def test_the_log_prob_beside_a_divergence_has_its_own_gradient(name: str) -> None:
    s, t = logits("ordinary")
    student = s.clone().requires_grad_()
    dist = TokenDist(student, torch.arange(5))
    FORMS[name](dist, TokenDist(t, torch.arange(5)))
    (ours,) = torch.autograd.grad(dist.at_sampled.sum(), student)
    plain = s.clone().requires_grad_()
    plain.log_softmax(-1).gather(-1, torch.arange(5)[:, None]).sum().backward()
    torch.testing.assert_close(ours, plain.grad)


@pytest.mark.parametrize("name", ["kl(T, S)", "kl(S, T)"])
def test_a_token_that_the_second_cannot_say_costs_infinity_only_where_somebody_weighs_it(name: str) -> None:
    s, t = logits("ordinary")
    (s if name == "kl(T, S)" else t)[1, 3] = -math.inf
    student = s.clone().requires_grad_()
    value = FORMS[name](TokenDist(student, torch.arange(5)), TokenDist(t, torch.arange(5)))
    assert value[1] == math.inf and value[[0, 2, 3, 4]].isfinite().all()
    weighed = torch.where(torch.arange(5) == 1, torch.zeros_like(value), value)
    (gradient,) = torch.autograd.grad(weighed.sum(), student)
    assert (gradient[1] == 0).all() and gradient.isfinite().all() and gradient[0].abs().sum() > 0


def test_two_sides_with_a_gradient_are_left_to_autograd() -> None:
    s, t = (z.requires_grad_() for z in logits("ordinary"))
    dists = [TokenDist(z, torch.arange(5)) for z in (s, t)]
    assert by_hand.kl(*dists) is None and by_hand.js(*dists, 0.5) is None
    value = kl(*dists)
    wanted = kl(s.log_softmax(-1), t.log_softmax(-1))
    for ours, theirs in zip(torch.autograd.grad(value.sum(), (s, t)), torch.autograd.grad(wanted.sum(), (s, t)),
                            strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_precisions_are_left_to_autograd() -> None:
    s, t = logits("ordinary")
    student = s.float().requires_grad_()
    for form in FORMS.values():
        wanted = form(TokenDist(student, torch.arange(5)), TokenDist(t.float(), torch.arange(5)))
        found = form(TokenDist(student, torch.arange(5)), TokenDist(t, torch.arange(5)))
        torch.testing.assert_close(found.float(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), student)[0],
                                   torch.autograd.grad(wanted.sum(), student)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_a_graph_that_was_not_kept_is_refused_and_its_first_gradient_stays(name: str) -> None:
    s, t = logits("ordinary")
    student = s.clone().requires_grad_()
    value = FORMS[name](TokenDist(student, torch.arange(5)), TokenDist(t, torch.arange(5))).mean()
    (first,) = torch.autograd.grad(value, student)
    before = first.clone()
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(value, student)
    assert (first == before).all()


def test_autocast_does_not_touch_a_divergence() -> None:
    s, t = (z.float() for z in logits("ordinary"))
    plain = kl(TokenDist(t, torch.arange(5)), TokenDist(s, torch.arange(5)))
    with torch.autocast("cpu", torch.bfloat16):
        found = kl(TokenDist(t, torch.arange(5)), TokenDist(s, torch.arange(5)))
    assert found.dtype == torch.float32 and (found == plain).all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_entropies_over_a_large_vocabulary_are_exact_whatever_the_logits_offset(offset: float) -> None:
    z = 2 * torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    z[1, 7], z[2, 8] = 24.0, -math.inf
    z = z + offset
    exact = torch.distributions.Categorical(logits=z.double().clamp(min=-1e30)).entropy()
    alone, beside = (TokenDist(z.clone().requires_grad_(), torch.tensor([1, 2, 3])) for _ in range(2))
    assert alone.at_sampled.requires_grad
    kl(beside, TokenDist(z.roll(1, 0), torch.tensor([1, 2, 3])))
    with torch.no_grad():
        for dist in (alone, beside):
            torch.testing.assert_close(dist.entropy().double(), exact, atol=3e-5, rtol=1e-5)


class Made(TorchDispatchMode):
    """Counts new tensors of `size` numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0
        self._held: list[Tensor] = []  # so that no address is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel() == self.size and x.untyped_storage().data_ptr() not in given:
                self.count += 1
                self._held.append(x)
        return out


@pytest.mark.parametrize(("name", "most"), [("kl(T, S)", 4), ("kl(S, T)", 3), ("clipped, loose", 5), ("js", 5),
                                            ("top-k, js", 4)])
def test_a_divergence_and_its_gradient_make_few_tensors_of_the_vocabularys_width(name: str, most: int) -> None:
    n, size = 3, 2**17  # a block is two rows
    s, t = torch.randn(2, n, size, generator=torch.Generator().manual_seed(0))
    student = TokenDist(s.requires_grad_(), torch.arange(n))
    with Made(n * size) as made:
        loss = FORMS[name](student, TokenDist(t, torch.arange(n)))
        torch.autograd.grad(loss.sum(), s)
        with torch.no_grad():
            student.entropy()
    assert made.count <= most
