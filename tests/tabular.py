"""Distributions on small tables, and what is asked of them: shared by the tests of papers' facts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def distributions(*shape: int, std: float = 1.0) -> Tensor:
    """Random log-probs, normalised over the last axis."""
    return (std * torch.randn(*shape, dtype=torch.float64)).log_softmax(-1)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of a scalar function."""
    x = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= tolerance)
