"""Policy-gradient surrogates, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from selftaught.records import TokenLoss
from selftaught.tensors import MAX_LOG_RATIO, difference, ratio

REFERENCE_KLS = ("urkl", "ufkl", "rkl", "fkl")


def importance_ratio(logp: Tensor, logp_old: Tensor | None) -> Tensor:
    """rho = exp(logp - logp_old). Without `logp_old` the batch is on-policy: value 1, gradient that of logp."""
    return ratio(logp, logp.detach() if logp_old is None else logp_old)


def capped_ratio(logp: Tensor, logp_old: Tensor | None, cap: float | None) -> Tensor:
    """min(sg rho, cap), a constant: what a loss is worth on a token drawn from an older policy."""
    rho = importance_ratio(logp.detach(), logp_old)
    return rho if cap is None else rho.clamp(max=cap)


def clipped(rho: Tensor, advantage: Tensor, *, eps_low: float | None, eps_high: float | None,
            dual_clip: float | None = None) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A); -rho A where an eps is None. All arguments (n,).

    `dual_clip` = c bounds the objective below by c A where A < 0 (arXiv 1912.09729 eq. 5).
    """
    objective = rho * advantage
    if eps_low is not None or eps_high is not None:
        low = None if eps_low is None else 1 - eps_low
        high = None if eps_high is None else 1 + eps_high
        objective = torch.minimum(objective, rho.clamp(low, high) * advantage)
    if dual_clip is not None:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    return -objective


def clip_ratio(rho: Tensor, advantage: Tensor, *, eps_low: float | None, eps_high: float | None,
               dual_clip: float | None = None) -> dict[str, Tensor]:
    """{"clip_ratio": (n,)}: 1 at tokens that `clipped` leaves without a gradient, though their advantage is not 0."""
    rho = rho.detach()
    out = torch.zeros_like(rho, dtype=torch.bool)
    if eps_high is not None:
        out |= (advantage > 0) & (rho > 1 + eps_high)
    if eps_low is not None:
        out |= (advantage < 0) & (rho < 1 - eps_low)
    if dual_clip is not None:
        out |= (advantage < 0) & (rho > dual_clip)
    return {"clip_ratio": out.to(rho.dtype)}


def clipped_loss(logp: Tensor, logp_old: Tensor | None, advantage: Tensor, *, eps_low: float | None,
                 eps_high: float | None, dual_clip: float | None = None) -> TokenLoss:
    """`clipped` of the ratio of `importance_ratio`, and `clip_ratio` beside it."""
    rho = importance_ratio(logp, logp_old)
    return TokenLoss(clipped(rho, advantage, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip),
                     clip_ratio(rho, advantage, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip))


def reference_penalty(kind: str, logp: Tensor, logp_reference: Tensor) -> Tensor:
    """K of the log-ratio log w = logp - log ref, clamped to +-20, at the sampled token (arXiv 2606.04036 eq. 3.1).

    urkl: log(w)^2 / 2; rkl: (log w + 1)^2 / 2; both have the expected gradient of KL(S||ref).
    ufkl: 1/w + log w; fkl: 1/w; both that of KL(ref||S). The u-forms have no gradient where S = ref, token by token.
    """
    log_w = difference(logp, logp_reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "urkl":
        return log_w**2 / 2
    if kind == "rkl":
        return (log_w + 1) ** 2 / 2
    return (-log_w).exp() + log_w if kind == "ufkl" else (-log_w).exp()
