"""Divergences by torch's operators, their gradients by hand: few tensors of the vocabulary's width, used again.

On a CPU every further tensor (n, V) costs more than the arithmetic on it, since the kernel hands out zeroed pages for
it, and autograd makes and keeps some for every operator. Here a divergence takes the log-probs and probabilities of
both sides, and leaves the gradient of the student's logits in one of them. What it says of the sampled tokens and the
entropy on the way, the distributions remember.

Shapes: n tokens, V vocabulary; all in nats. A function of two sides returns None where autograd has to do it: both have
a gradient, or theirs are two precisions.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from selftaught.vocabulary import Known, TokenDist, dot, keeps_graph

TINY = 1e-30  # a mass below it is summed from its logarithms


def kl(p: TokenDist, q: TokenDist) -> Tensor | None:
    """KL(P||Q)."""
    if (moving := _moving(p, q)) is None:
        return None
    (logp, p_probs), (logq, q_probs) = _parts(p), _parts(q, probs=q in moving)
    value, gap = _expected(p_probs, torch.sub(logp, logq, out=logp))
    if q in moving:
        return _with_gradient(q, value, q_probs.sub_(p_probs))
    return _with_gradient(p, value, gap.sub_(value[:, None]).mul_(p_probs)) if moving else value


def clipped_kl(p: TokenDist, q: TokenDist, clip: float) -> Tensor | None:
    """sum_v min(P_v log(P_v / Q_v), clip)."""
    moving = _moving(p, q)
    if moving is None or p in moving:  # P is constant here
        return None
    (logp, p_probs), (logq, q_probs) = _parts(p), _parts(q, probs=bool(moving))
    terms = torch.sub(logp, logq, out=logp).mul_(p_probs)
    if torch.isnan(terms.sum()):
        terms.masked_fill_(p_probs == 0, 0.0)
    capped = terms > clip
    value = terms.clamp_(max=clip).sum(-1)
    if not moving:
        return value
    kept = p_probs.masked_fill_(capped, 0.0)
    return _with_gradient(q, value, q_probs.mul_(kept.sum(-1, keepdim=True)).sub_(kept))


def js(p: TokenDist, q: TokenDist, weight: float) -> Tensor | None:
    """weight KL(P||M) + (1 - weight) KL(Q||M), M = weight P + (1 - weight) Q."""
    if (moving := _moving(p, q)) is None:
        return None
    (logp, p_probs), (logq, q_probs) = _parts(p), _parts(q)
    least = torch.finfo(logp.dtype).tiny  # what is below it weighs nothing, and has a logarithm so
    logm = torch.lerp(q_probs, p_probs, weight).clamp_min_(least).log_()
    of_p, p_gap = _expected(p_probs, logp.sub_(logm))
    of_q, q_gap = _expected(q_probs, logq.sub_(logm))
    value = weight * of_p + (1 - weight) * of_q
    if not moving:
        return value
    mine = (p, weight, of_p, p_gap, p_probs) if p in moving else (q, 1 - weight, of_q, q_gap, q_probs)
    student, share, known, gap, probs = mine
    return _with_gradient(student, value, gap.sub_(known[:, None]).mul_(probs).mul_(share))


def buckets(dist: TokenDist, top: Tensor) -> Tensor:
    """Log-probs of the tokens `top` (n, k), and of all others together: (n, k + 1)."""
    logp, probs = _parts(dist)
    named = logp.gather(-1, top)
    rest = probs.scatter_(-1, top, 0.0)  # of the others, to be scaled by `per_tail` for the tail's gradient
    mass = rest.sum(-1)
    tail, per_tail, per_all = mass.log(), 1 / mass, torch.ones_like(mass)
    if not bool((mass > TINY).all()):  # of what underflows, too
        logp.scatter_(-1, top, -math.inf)
        tail = torch.logsumexp(logp, -1)
        rest = logp.sub_(tail.clamp_min(-torch.finfo(tail.dtype).max)[:, None]).exp_()
        per_tail, per_all = torch.ones_like(mass), tail.exp()
    value = torch.cat([named, tail[:, None]], -1)
    if not _moving(dist):
        return value

    def gradient(grad: Tensor) -> Tensor:
        of_all = grad.sum(-1)
        out = _scaled(rest, grad[:, -1] * per_tail - of_all * per_all)
        return out.scatter_(-1, top, grad[:, :-1] - named.exp() * of_all[:, None])

    return Known.apply(dist.logits, value, gradient)


def _moving(*dists: TokenDist) -> list[TokenDist] | None:
    """Those that have a gradient; None of more than one, and of two precisions."""
    found = [x for x in dists if torch.is_grad_enabled() and x.logits.requires_grad]
    return found if len(found) < 2 and len({x.logits.dtype for x in dists}) == 1 else None


def _parts(dist: TokenDist, probs: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probs and probabilities (n, V), to be changed in place; without `probs`, no probabilities."""
    logp = torch.log_softmax(dist.logits.detach(), -1)
    found = logp.exp() if probs else logp[:, :0]
    dist.note(logp, found if probs else None)
    return logp, found


def _expected(probs: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v P_v gap_v, and the gap, which is 0 where P_v is 0 if it could not be summed otherwise."""
    value = dot(probs, gap)
    if torch.isnan(value).any():  # 0 inf, or -inf minus -inf
        value = dot(probs, gap.masked_fill_(probs == 0, 0.0))
    return value, gap


def _with_gradient(student: TokenDist, value: Tensor, unit: Tensor) -> Tensor:
    """The value (n,), with `unit` (n, V) as its gradient in the student's logits, handed over at the first backward."""
    found: Tensor = Known.apply(student.logits, value, partial(_scaled, unit))
    return found


def _scaled(unit: Tensor, grad_n: Tensor) -> Tensor:
    """grad unit, and 0 where the incoming gradient is 0: an infinite loss that nobody weighs stays nobody's."""
    out = unit * grad_n[:, None] if keeps_graph() else unit.mul_(grad_n[:, None])
    if not bool(grad_n.all()):
        out[grad_n == 0] = 0.0
    return out
