"""From per-token losses to one number: a weight per token, computed once for the whole optimiser batch."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from selftaught.records import Section
from selftaught.tensors import LOCAL, Reducer, ratio, segment_sum

Reduction = Literal["token_mean", "sequence_mean", "constant"]
REDUCTIONS = ("token_mean", "sequence_mean", "constant")


class LossConfig(Section):
    """How token losses become one number."""

    reduction: Reduction = Field("token_mean", description="token_mean, sequence_mean or constant")
    length: int | None = Field(None, description="the divisor per rollout of `constant`", gt=0)
    sampler_cap: float | None = Field(None, gt=0, description="cap of the correction for the sampler's log-probs; "
                                      "null: none (the built-in engine samples on the training weights)")
    chunk: int | None = Field(None, gt=0, description="tokens per chunk of the vocabulary head; null: by V and the "
                              "device")


def token_weights(reduction: str, counted_N: Tensor, sequence_ids_N: Tensor, *, length: int | None = None,
                  dtype: torch.dtype = torch.float32, reducer: Reducer = LOCAL) -> Tensor:
    """One weight per token (N,), such that the loss is the weighted sum of token losses; 0 where not counted.

    token_mean: 1 / (counted tokens of the batch, at least 1). sequence_mean: mean over the counted tokens of each
    rollout, then over the rollouts that have any. constant: 1 / (B length), B rollouts.

    Raises:
        ValueError: an unknown reduction, or `constant` without `length`.
    """
    rollouts = int(sequence_ids_N.max()) + 1 if sequence_ids_N.numel() else 0
    counted = counted_N.to(dtype)
    if reduction == "token_mean":
        return counted / reducer.sum(counted.sum()).clamp_min(1)
    if reduction == "sequence_mean":
        per_rollout = segment_sum(counted, sequence_ids_N, rollouts)
        live = reducer.sum((per_rollout > 0).to(dtype).sum()).clamp_min(1)
        return counted / (per_rollout.clamp_min(1)[sequence_ids_N] * live)
    if reduction == "constant":
        if length is None:
            raise ValueError("reduction='constant' needs `length`, the divisor per rollout (the maximum length)")
        return counted / (reducer.sum(torch.tensor(float(rollouts), dtype=dtype, device=counted.device)) * length)
    raise ValueError(f"unknown reduction {reduction!r}; known: {', '.join(REDUCTIONS)}")


def sampler_correction(logp_old_N: Tensor, logp_sampler_N: Tensor, cap: float) -> Tensor:
    """min(exp(logp_old - logp_sampler), cap), a constant: truncated importance sampling per token, (N,)."""
    return ratio(logp_old_N, logp_sampler_N).clamp(max=cap)
