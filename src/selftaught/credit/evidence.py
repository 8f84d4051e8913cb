"""Evidence weights: how much more likely the privileged teacher finds a sampled token than the student does."""

from __future__ import annotations

import torch
from torch import Tensor

from selftaught.tensors import MAX_LOG_RATIO, difference


def evidence(teacher_N: Tensor, student_N: Tensor) -> Tensor:
    """d = log T(y) - log S(y), clamped to +-20; 0 where both are -inf (arXiv 2604.03128 eq. 13)."""
    return difference(teacher_N, student_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def evidence_weight(d_N: Tensor, advantage_N: Tensor, eps_w: float) -> Tensor:
    """clip(exp(sign(A) d), 1 - eps_w, 1 + eps_w) (arXiv 2604.03128 eqs. 14 and 15): (N,)."""
    return torch.exp(torch.sign(advantage_N) * d_N).clamp(1 - eps_w, 1 + eps_w)
