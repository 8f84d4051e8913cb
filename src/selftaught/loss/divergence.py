"""Divergences between next-token distributions, exact over the vocabulary, in nats, per token.

`kl(p, q)` is KL(P||Q): the order of the arguments is the order of the name. All take distributions, as log-probs
(n, V) or as a `TokenDist`, and return (n,). Of a `TokenDist` the gradient is by hand: kernels read its logits where
they lie (`fused`), and where there are none few tensors are made (`by_hand`). A token that both hold at -inf
contributes 0, to the value and to the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selftaught.loss import by_hand, fused
from selftaught.loss.fused import Distribution, log_probs_of
from selftaught.tensors import largest, product
from selftaught.vocabulary import TokenDist

_Form = Callable[..., Tensor | None]
DIVERGENCES = ("js", "kl_student_teacher", "kl_teacher_student")


def kl_terms(logp: Tensor, logq: Tensor) -> Tensor:
    """The summands P_v log(P_v / Q_v): (n, V).

    Raises:
        ValueError: P and Q are over vocabularies of two sizes.
    """
    if logp.shape[-1] != logq.shape[-1]:
        raise ValueError(f"a vocabulary of {logp.shape[-1]} and one of {logq.shape[-1]} have no divergence")
    return product(logp.exp(), logp - logq)


def kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(P||Q) = sum_v P_v log(P_v / Q_v)."""
    found = _found(fused.kl, by_hand.kl, p, q)
    return kl_terms(log_probs_of(p), log_probs_of(q)).sum(-1) if found is None else found


def _found(kernels: _Form, by_torch: _Form, p: Distribution, q: Distribution, *given: float) -> Tensor | None:
    """By kernels, or by hand; None of log-probs, and where autograd has to do it."""
    if not (isinstance(p, TokenDist) and isinstance(q, TokenDist) and fused.width(p) == fused.width(q)):
        return None
    found = kernels(p, q, *given)
    return by_torch(p, q, *given) if found is None else found


def clipped_kl(p: Distribution, q: Distribution, clip: float | None) -> Tensor:
    """sum_v min(P_v log(P_v / Q_v), clip): KL(P||Q) with every summand capped (arXiv 2601.18734 v3).

    Capped summands have no gradient, so the value may be negative and the direction may turn; None: no cap.
    """
    if clip is None:
        return kl(p, q)
    found = _found(fused.clipped_kl, by_hand.clipped_kl, p, q, clip)
    return kl_terms(log_probs_of(p), log_probs_of(q)).clamp(max=clip).sum(-1) if found is None else found


def js(p: Distribution, q: Distribution, weight: float = 0.5, floor: float = 0.0) -> Tensor:
    """weight KL(P||M) + (1 - weight) KL(Q||M), M = weight P + (1 - weight) Q, 0 < weight < 1 (arXiv 2306.13649).

    At most ln 2. Its limits at weight 0 and 1 are 0, not the two KLs: those are functions of their own. With a floor,
    P and Q are raised to it first, and not renormalised.
    """
    found = fused.js(p, q, weight, floor) if floor else _found(fused.js, by_hand.js, p, q, weight)
    if found is not None:
        return found
    logp, logq = raised(floor, log_probs_of(p), log_probs_of(q))
    # What M adds to the gradient sums to 0 over the vocabulary, where P and Q are normalised: it may be constant.
    logm = mixture((logp, logq) if floor > 0 else (logp.detach(), logq.detach()), (weight, 1 - weight))
    return weight * kl(logp, logm) + (1 - weight) * kl(logq, logm)


def divergence(name: str, teacher: Distribution, student: Distribution, weight: float = 0.5) -> Tensor:
    """One of `DIVERGENCES` between teacher and student; `weight` is the teacher's in js."""
    if name == "js":
        return js(teacher, student, weight)
    return kl(student, teacher) if name == "kl_student_teacher" else kl(teacher, student)


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """log sum exp along `dim`; where all entries are -inf it is -inf, without gradient (torch's own has NaN)."""
    dead = (x == -math.inf).all(dim, keepdim=True)
    return torch.logsumexp(x.masked_fill(dead, 0.0), dim).masked_fill(dead.squeeze(dim), -math.inf)


def mixture(logps: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log sum_k weight_k P_k, as a log-sum-exp: the arithmetic mean of distributions, (n, V)."""
    return log_sum_exp(torch.stack([p + math.log(w) for p, w in zip(logps, weights, strict=True)]), 0)


def barycenter(logp: Tensor, logq: Tensor, share_n: Tensor) -> Tensor:
    """log of P^(1 - share) Q^share, normalised: the geometric mean, (n, V) (arXiv 2607.02502 eq. 9)."""
    blend = _times(1 - share_n[:, None], logp) + _times(share_n[:, None], logq)
    return blend - log_sum_exp(blend, -1)[:, None]


def kl_to_barycenter(student: Distribution, p: Distribution, q: Distribution, share_n: Tensor, floor: float = 0.0
                     ) -> Tensor:
    """KL(S||B) of the `barycenter` B of P and Q, which are raised to the floor first (arXiv 2607.02502 eqs. 9, 12).

    A token that all three hold to be impossible stays it.
    """
    if (found := fused.kl_to_barycenter(student, p, q, share_n, floor)) is not None:
        return found
    logs = log_probs_of(student)
    logps = log_probs_of(p), log_probs_of(q)
    dead = torch.stack([logs.detach(), *logps]).eq(-math.inf).all(0)
    logp, logq = (x.masked_fill(dead, -math.inf) for x in raised(floor, *logps))
    return kl(logs, barycenter(logp, logq, share_n))


def raised(floor: float, *logps: Tensor) -> tuple[Tensor, ...]:
    """Log-probs of at least log(floor), not renormalised; 0: as they are."""
    return tuple(logp.clamp(min=math.log(floor)) for logp in logps) if floor > 0 else logps


def _times(share: Tensor, logp: Tensor) -> Tensor:
    """share logp, with 0 where the share is 0: P^0 is 1, also of P = 0."""
    return torch.where(share == 0, torch.zeros_like(logp), share * logp)


def with_tail(k: int | None, student: Distribution, *others: Distribution) -> tuple[Distribution, ...]:
    """Log-probs on the student's k likeliest tokens, and one bucket with the rest of each: (n, k + 1) each.

    The tail is the log-sum-exp of the other tokens, never log(1 - sum): that is 0 or NaN in float32 where the k
    hold nearly everything. Divergences on the buckets are divergences, and never above those on the vocabulary.
    None, or k of the whole vocabulary: all as they are. Log-probs given as tensors are normalised.
    """
    if k is None or k >= fused.width(student):
        return (student, *others)
    if (found := fused.with_tail(k, student, others)) is not None:
        return found
    dists = [x if isinstance(x, TokenDist) else TokenDist(x, torch.zeros_like(x[:, 0], dtype=torch.int64))
             for x in (student, *others)]
    top = largest(dists[0].logits.detach(), k)
    return tuple(by_hand.buckets(dist, top) for dist in dists)
