"""Policies as tables of probabilities, and descent on the package's own objectives.

A policy over A outcomes is one row of A logits; an outcome is a response of one token. Beside those of the package,
the axes are C: tables at a time, K: demonstrations (teachers), A: outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from selftaught.methods import objective
from selftaught.records import TokenBatch

RATE = 0.5
STEPS = 4000


def distributions(generator: Generator, *shape: int, std: float = 1.0) -> Tensor:
    """Random log-probs, normalised over the last axis."""
    return (std * torch.randn(*shape, dtype=torch.float64, generator=generator)).log_softmax(-1)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float = 1e-13) -> Tensor:
    """Log-probs (..., A) at which natural-gradient descent on `loss` from `start` rests.

    The gradient in the logits is divided by the probabilities, which for a softmax is the natural gradient: rare
    outcomes settle as soon as likely ones. `loss` is a sum over the rows, each with a curvature of about 1; only
    its gradient is used, so that policy-gradient losses, which have no value to watch, are descended too.
    """
    logp = start.log_softmax(-1)
    for _ in range(STEPS):
        x = logp.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x), x)
        step = slope / logp.exp()
        logp = (logp - (RATE * step).clamp(-1, 1)).log_softmax(-1)
        if step.abs().max() < tolerance:
            return logp
    raise AssertionError(f"descent still moves by {float(step.abs().max()):.1e} after {STEPS} steps")


def batch_of(tokens_N: Tensor, reward_N: Tensor | None = None, group_N: Tensor | None = None) -> TokenBatch:
    """Responses of one token each; all in one group and equally right if nothing else is said."""
    n = tokens_N.shape[0]
    zeros = torch.zeros(n, dtype=torch.int64)
    return TokenBatch(tokens_N, torch.arange(n), reward=torch.zeros(n, dtype=torch.float64) if reward_N is None
                      else reward_N, group=zeros if group_N is None else group_N)


def token_loss(name: str, logits: Mapping[str, Tensor], tokens: Tensor | None = None, *,
               reward: Tensor | None = None, group: Tensor | None = None, **fields: Any) -> Tensor:
    """The method's unreduced losses, in the shape of its rows: logits (..., A), the rest (...).

    Without `tokens` the loss must be one over the vocabulary, for which the sampled token is of no account.
    """
    shape = logits["student"].shape
    flat = {view: value.expand(shape).reshape(-1, shape[-1]) for view, value in logits.items()}
    sampled = torch.zeros(shape[:-1], dtype=torch.int64) if tokens is None else tokens.expand(shape[:-1])
    batch = batch_of(sampled.reshape(-1), None if reward is None else reward.expand(shape[:-1]).reshape(-1),
                     None if group is None else group.expand(shape[:-1]).reshape(-1))
    return objective(name, batch, flat, **fields).token_loss.reshape(shape[:-1])


def every_outcome(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row per outcome, for expectations over the policy that are sums and not samples.

    From logits (..., A): the same logits (..., A, A), the outcome of each row (A,), and its probability (..., A), a
    constant: the sum of probability times a policy-gradient loss has its exact expected gradient.
    """
    a = logits.shape[-1]
    return logits[..., None, :].expand(*logits.shape, a), torch.arange(a), logits.detach().softmax(-1)


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of `loss(at).sum()`."""
    x = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def entropy(logp: Tensor) -> Tensor:
    return -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(P||Q), written out here once more: what the package's own divergences are compared with."""
    return (logp.exp() * (logp - logq)).sum(-1)


def copy_teachers(k: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two right outcomes with base ratio k, and a wrong one as likely as the rarer of them.

    Each teacher copies its demonstration, T(.|y') = (1 - eps) delta_y' + eps base; demonstrations are drawn as the base
    draws right answers. Returns log base (3,), log teachers (2, 3), weights (2,).
    """
    base = torch.tensor([k, 1.0, 1.0], dtype=torch.float64) / (k + 2)
    teachers = (1 - eps) * torch.eye(3, dtype=torch.float64)[:2] + eps * base
    return base.log(), teachers.log(), base[:2] / base[:2].sum()
