"""Distributions on small tables, and what is asked of them: shared by the tests of papers' facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from selftaught.methods import objective
from selftaught.records import TokenBatch

V = 11
LENGTHS = (5, 1, 4, 3, 6, 2)
VIEWS = ("teacher", "reference", "privileged_student")


def distributions(*shape: int, std: float = 1.0) -> Tensor:
    """Random log-probs, normalised over the last axis."""
    return (std * torch.randn(*shape, dtype=torch.float64)).log_softmax(-1)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of a scalar function."""
    x = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= tolerance)


def make_case(seed: int = 0, *, old: bool = False, step: int = 7) -> tuple[TokenBatch, dict[str, Tensor]]:
    """Six ragged rollouts of two problems, all privileged; logits of the student and of every view, float64."""
    torch.manual_seed(seed)
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    logits = {view: 2 * torch.randn(len(ids), V, dtype=torch.float64) for view in ("student", *VIEWS)}
    tokens = torch.randint(0, V, (len(ids),))
    logp = logits["student"].log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    reward = torch.tensor([1.0, 0.0, 0.25, 0.0, 1.0, 0.5], dtype=torch.float64)
    return TokenBatch(tokens, ids, reward, torch.tensor([4, 4, 4, 9, 9, 9]),
                      logp_old=logp + 0.5 * torch.randn(len(ids), dtype=torch.float64) if old else None,
                      step=step), logits


Outcome = tuple[Tensor, Tensor]


def outcome(name: str, case: tuple[TokenBatch, Mapping[str, Tensor]], *, reduction: str = "token_mean",
            **fields: Any) -> Outcome:
    """The loss, and its gradient in the student's logits."""
    batch, logits = case
    student = logits["student"].clone().requires_grad_()
    loss = objective(name, batch, {**logits, "student": student}, reduction=reduction, **fields).loss
    loss.backward()
    return loss.detach(), student.grad


def same(a: Outcome, b: Outcome, tolerance: float = 0.0) -> bool:
    return all(close(x, y, tolerance) for x, y in zip(a, b, strict=True)) and bool(a[1].abs().max() > 1e-4)
