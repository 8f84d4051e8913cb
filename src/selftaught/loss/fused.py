"""Divergences by kernels that read the logits of both sides where they lie, on a GPU or a CPU.

Each function returns None where the kernels do not fit: other devices or types, mixtures, or a gradient that is not the
student's alone. The caller then takes torch's operators, whose numbers these have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from selftaught.kernels import rows_of
from selftaught.kernels.base import Side
from selftaught.tensors import largest
from selftaught.vocabulary import Known, TokenDist

Distribution = Tensor | TokenDist  # log-probs (n, V), or what makes them


def log_probs_of(x: Distribution) -> Tensor:
    """(n, V) in nats."""
    return x if isinstance(x, Tensor) else x.log_probs


def width(x: Distribution) -> int:
    """V."""
    return int((x if isinstance(x, Tensor) else x.raw).shape[-1])


def kl(p: Distribution, q: Distribution) -> Tensor | None:
    """KL(P||Q), and on its way the statistics of both."""
    if (pair := _pair(p, q)) is None:
        return None
    (p, q), student = pair
    value, p.statistics, q.statistics = rows_of(p.raw).kl(p.raw.detach(), q.raw.detach(), p.tokens, p.scale, q.scale)
    if student is p:
        return _with_gradient("kl_from", value, p, q, value)
    return _with_gradient("kl_to", value, q, p, value)


def clipped_kl(p: Distribution, q: Distribution, clip: float) -> Tensor | None:
    """sum_v min(P_v log(P_v / Q_v), clip); P is constant."""
    if (pair := _pair(p, q)) is None or pair[1] is pair[0][0]:
        return None
    p, q = pair[0]
    lses = p.statistics.lse, q.statistics.lse
    value, mass = rows_of(p.raw).clipped(p.raw.detach(), q.raw.detach(), p.scale, q.scale, *lses, clip)
    return _with_gradient("clipped", value, q, p, mass, clip)


def js(p: Distribution, q: Distribution, weight: float, floor: float = 0.0) -> Tensor | None:
    """weight KL(P||M) + (1 - weight) KL(Q||M), M = weight P + (1 - weight) Q; with a floor, of two constant sides."""
    if (pair := _pair(p, q)) is None or (floor and pair[1] is not None):
        return None
    (p, q), student = pair
    of_p, of_q = rows_of(p.raw).js(p.raw.detach(), q.raw.detach(), p.scale, q.scale, p.statistics.lse,
                                  q.statistics.lse, weight, log(floor))
    value = weight * of_p + (1 - weight) * of_q
    if student is p:
        return _with_gradient("js", value, p, q, of_p, weight)
    return _with_gradient("js", value, q, p, of_q, 1 - weight)


def kl_to_barycenter(student: Distribution, p: Distribution, q: Distribution, share_n: Tensor, floor: float
                     ) -> Tensor | None:
    """KL(S||B), B in proportion to P^(1 - share) Q^share; P, Q and the share are constant."""
    if (to_p := _pair(student, p)) is None or (to_q := _pair(student, q)) is None or share_n.requires_grad:
        return None
    student, p, q = *to_p[0], to_q[0][1]
    if any(pair[1] not in (student, None) for pair in (to_p, to_q)):
        return None
    of = [Side(x.raw.detach(), x.scale, x.statistics.lse) for x in (student, p, q)]
    rows, low, share_n = rows_of(student.raw), log(floor), share_n.to(student.raw.dtype).expand(of[0].lse.shape)
    value, log_mass = rows.blend(*of, share_n, low)
    return Known.apply(student.raw, value,
                       lambda grad: rows.blend_gradient(*of, share_n, low, value, log_mass, grad))


def log(floor: float) -> float:
    """-inf of no floor."""
    return math.log(floor) if floor > 0 else -math.inf


def with_tail(k: int, student: Distribution, others: Sequence[Distribution]) -> tuple[Tensor, ...] | None:
    """Log-probs on the student's k likeliest tokens, and of all others together: (n, k + 1) each."""
    dists = [x for x in (student, *others) if isinstance(x, TokenDist) and x.in_place]
    if len(dists) <= len(others) or len({dist.raw.shape for dist in dists}) > 1:
        return None
    top = largest(dists[0].raw.detach(), k)
    named = torch.zeros(dists[0].raw.shape, dtype=torch.uint8, device=top.device).scatter_(-1, top, 1)
    return tuple(_buckets(dist, top, named) for dist in dists)


def _buckets(dist: TokenDist, top: Tensor, named: Tensor) -> Tensor:
    logits, scale, rows = dist.raw.detach(), dist.scale, rows_of(dist.raw)
    value, rest, dist.statistics = rows.buckets(logits, dist.tokens, scale, named, top)
    lse = dist.statistics.lse
    return Known.apply(dist.raw, value, lambda grad: rows.buckets_gradient(logits, scale, lse, rest, top, grad))


def _pair(p: Distribution, q: Distribution) -> tuple[tuple[TokenDist, TokenDist], TokenDist | None] | None:
    """Both, and which of them is the student, if one is; None where the kernels do not fit."""
    if not (isinstance(p, TokenDist) and isinstance(q, TokenDist) and p.in_place and q.in_place):
        return None
    moving = [x for x in (p, q) if torch.is_grad_enabled() and x.raw.requires_grad]
    if len(moving) > 1 or p.raw.shape != q.raw.shape:
        return None
    return (p, q), moving[0] if moving else None


def _with_gradient(kind: str, value: Tensor, student: TokenDist, other: TokenDist, known: Tensor, number: float = 0.0
                   ) -> Tensor:
    s, t, rows = student.raw.detach(), other.raw.detach(), rows_of(student.raw)
    scales, lses = (student.scale, other.scale), (student.statistics.lse, other.statistics.lse)
    return Known.apply(student.raw, value,
                       lambda grad: rows.gradient(kind, s, t, *scales, *lses, grad, known, number))
