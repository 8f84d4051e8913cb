"""Policy-gradient surrogates, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from selftaught.tensors import ratio


def importance_ratio(logp: Tensor, logp_old: Tensor | None) -> Tensor:
    """rho = exp(logp - logp_old). Without `logp_old` the batch is on-policy: value 1, gradient that of logp."""
    return ratio(logp, logp.detach() if logp_old is None else logp_old)


def clipped_surrogate(logp: Tensor, logp_old: Tensor | None, advantage: Tensor, *, eps_low: float | None,
                      eps_high: float | None, dual_clip: float | None = None) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A); -rho A where an eps is None.

    `dual_clip` = c bounds the objective below by c A where A < 0 (arXiv 1912.09729 eq. 5). All arguments (n,).
    """
    rho = importance_ratio(logp, logp_old)
    objective = rho * advantage
    if eps_low is not None or eps_high is not None:
        low = None if eps_low is None else 1 - eps_low
        high = None if eps_high is None else 1 + eps_high
        objective = torch.minimum(objective, rho.clamp(low, high) * advantage)
    if dual_clip is not None:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    return -objective
