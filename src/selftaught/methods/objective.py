"""The objectives inside anybody's trainer: dense as the reference, chunked in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selftaught.loss import chunked_loss, masked, sampler_correction, token_weights
from selftaught.methods.base import Method, build
from selftaught.records import Credit, TokenBatch
from selftaught.tensors import upcast
from selftaught.vocabulary import Head, TokenDist, as_head, sampled_log_probs


@dataclass(frozen=True)
class Objective:
    """loss: scalar, differentiable in the student only. token_loss (N,): before reduction. credit: (N,) tensors."""

    loss: Tensor
    token_loss: Tensor
    credit: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]


def objective(name: str, batch: TokenBatch, logits: Mapping[str, Tensor], *, reduction: str = "token_mean",
              length: int | None = None, sampler_cap: float | None = 2.0, **fields: Any) -> Objective:
    """A method's loss from logits (N, V) of the student and of each view: the dense reference of every fast path.

    float64 in gives float64 out. No model, no chunking; the gradient reaches logits["student"] alone.

    Raises:
        ValueError: an unknown method or field, a view without logits, shapes that do not agree.
    """
    method = build(name, **fields)
    _check(method, batch, {view: (tensor.shape[0], tensor.shape[1]) for view, tensor in logits.items()})
    student = TokenDist(logits["student"], batch.tokens)
    views = {view: TokenDist(logits[view].detach(), batch.tokens) for view in method.views}
    logp = {view: dist.at_sampled for view, dist in views.items() if view in method.scores}
    logp["student"] = student.at_sampled.detach()
    if "student.entropy" in method.scores:
        logp["student.entropy"] = student.entropy().detach()
    credit, weight, correction = batch_credit(method, batch, logp, reduction=reduction, length=length,
                                              sampler_cap=sampler_cap, dtype=logp["student"].dtype)
    out = method.loss(student, views, credit)
    token_loss = out.loss * correction
    with torch.no_grad():
        seen = {"entropy": student.entropy(), "logp": student.at_sampled.detach(), **out.metrics}
    return Objective((masked(token_loss, weight) * weight).sum(), token_loss, credit, seen)


def chunked_objective(name: str, batch: TokenBatch, hidden: Mapping[str, Tensor],
                      heads: Mapping[str, Head | Tensor | tuple[Tensor, Tensor]], *, chunk: int | None = None,
                      reduction: str = "token_mean", length: int | None = None, sampler_cap: float | None = 2.0,
                      head_grad: Tensor | None = None, **fields: Any) -> Objective:
    """The same from hidden states (N, H) and heads, a (V, H) weight or a (weight, bias) pair, in O(chunk x V) memory.

    `chunk=None` is a pure function of V and the device. Gradients reach hidden["student"] and heads["student"] alone.
    `head_grad` (V, H), in float32: the gradient of the student's head is added to it at once, and not by `backward`.

    Raises:
        ValueError: as `objective`.
    """
    method = build(name, **fields)
    held = {view: as_head(head) for view, head in heads.items()}
    _check(method, batch, _head_sizes(hidden, held))
    logp = {}
    wanted = {*(method.scores & method.views.keys())}
    if "student" in method.scores or "student.entropy" in method.scores or batch.logp_sampler is not None:
        wanted.add("student")
    for view in sorted(wanted):
        logp[view], entropy = sampled_log_probs(hidden[view], held[view], batch.tokens, chunk=chunk,
                                                entropy=view == "student" and "student.entropy" in method.scores)
        if entropy is not None:
            logp["student.entropy"] = entropy
    credit, weight, correction = batch_credit(method, batch, logp, reduction=reduction, length=length,
                                              sampler_cap=sampler_cap, dtype=upcast(hidden["student"][:0]).dtype)
    out = chunked_loss(method.loss, {v: hidden[v] for v in ("student", *method.views)}, held, batch.tokens, credit,
                       weight * correction, chunk=chunk, head_grad=head_grad)
    return Objective(out.loss, out.token_loss * correction, credit, out.metrics)


@torch.no_grad()
def batch_credit(method: Method, batch: TokenBatch, logp: Mapping[str, Tensor], *, reduction: str,
                 length: int | None, sampler_cap: float | None,
                 dtype: torch.dtype = torch.float32) -> tuple[Credit, Tensor, Tensor]:
    """What is constant for a whole optimiser batch, of which micro-batches and chunks take slices.

    Returns the method's credit, the weight of every token (N,), and the factor of every token loss (N,) that
    corrects for the sampler: min(exp(logp_old - logp_sampler), sampler_cap), or ones.
    """
    credit = {name: value.detach() for name, value in method.credit(batch, logp).items()}
    weight = token_weights(reduction, credit["counted"], batch.sequence_ids, length=length, dtype=dtype)
    if batch.logp_sampler is None or sampler_cap is None:
        return credit, weight, torch.ones_like(weight)
    old = logp["student"] if batch.logp_old is None else batch.logp_old
    return credit, weight, sampler_correction(old, batch.logp_sampler, sampler_cap).to(dtype)


def _check(method: Method, batch: TokenBatch, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse by name what does not fit together; `shapes` holds rows and vocabulary of each view."""
    for view in ("student", *method.views):
        if view not in shapes:
            given = ", ".join(sorted(shapes))
            raise ValueError(f"method {method.name!r} needs logits or hidden states of {view!r}; given: {given}")
    tokens, vocabulary = batch.tokens.shape[0], shapes["student"][1]
    for view, (rows, width) in shapes.items():
        if rows != tokens:
            raise ValueError(f"{view!r} has {rows} rows, the batch has {tokens} tokens")
        if width != vocabulary and view in method.views.keys() - method.scores:  # `scores` are read at one token
            raise ValueError(f"{view!r} has a vocabulary of {width}, the student one of {vocabulary}")
    for field in ("sequence_ids", "logp_old", "terminal", "mask", "logp_sampler"):
        value = getattr(batch, field)
        if value is not None and value.shape != batch.tokens.shape:
            shapes_are = f"{tuple(value.shape)}, tokens have {tuple(batch.tokens.shape)}"
            raise ValueError(f"TokenBatch.{field} has shape {shapes_are}")
    given_B = {field: getattr(batch, field) for field in ("reward", "group", "privileged", "privileges")}
    rollouts = max([int(batch.sequence_ids.max()) + 1 if tokens else 0,
                    *(value.shape[0] for value in given_B.values() if value is not None)])
    for field, value in given_B.items():
        if value is not None and value.shape != (rollouts,):
            raise ValueError(f"TokenBatch.{field} has shape {tuple(value.shape)}, the batch has {rollouts} rollouts")


def _head_sizes(hidden: Mapping[str, Tensor], heads: Mapping[str, Head]) -> dict[str, tuple[int, int]]:
    """Rows and vocabulary of each view; a view without a head of its width is refused by name."""
    for view, states in hidden.items():
        if view not in heads:
            raise ValueError(f"hidden states of {view!r} need a head in `heads`; given: {', '.join(sorted(heads))}")
        if states.shape[1] != heads[view].weight.shape[1]:
            widths = f"{states.shape[1]}, its head takes {heads[view].weight.shape[1]}"
            raise ValueError(f"hidden states of {view!r} have width {widths}")
    return {view: (states.shape[0], heads[view].weight.shape[0]) for view, states in hidden.items()}
