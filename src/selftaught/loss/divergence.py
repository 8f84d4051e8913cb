"""Divergences between next-token distributions, exact over the vocabulary, in nats, per token.

`kl(p, q)` is KL(P||Q): the order of the arguments is the order of the name. All take log-probs (n, V) and return
(n,). A token that both hold at -inf contributes 0, to the value and to the gradient.
"""

from __future__ import annotations

from torch import Tensor

from selftaught.tensors import product


def kl_terms(logp: Tensor, logq: Tensor) -> Tensor:
    """The summands P_v log(P_v / Q_v): (n, V)."""
    return product(logp.exp(), logp - logq)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(P||Q) = sum_v P_v log(P_v / Q_v)."""
    return kl_terms(logp, logq).sum(-1)


def clipped_kl(logp: Tensor, logq: Tensor, clip: float | None) -> Tensor:
    """sum_v min(P_v log(P_v / Q_v), clip): KL(P||Q) with every summand capped (arXiv 2601.18734 v3).

    Capped summands have no gradient, so the value may be negative and the direction may turn; None: no cap.
    """
    terms = kl_terms(logp, logq)
    return (terms if clip is None else terms.clamp(max=clip)).sum(-1)
