"""Which tokens count, and how what belongs to a rollout reaches its tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from selftaught.records import TokenBatch


def broadcast(values_B: Tensor, batch: TokenBatch) -> Tensor:
    """A value per rollout, given to each of its tokens: (N,)."""
    return values_B[batch.sequence_ids]


def base_credit(batch: TokenBatch, *, needs_reward: bool = False, needs_privilege: bool = False) -> dict[str, Tensor]:
    """`counted` (N,), and `logp_old` (N,) where the batch has it.

    Not counted: tokens outside `batch.mask`; with `needs_reward`, tokens of rollouts without a score; with
    `needs_privilege`, tokens of rollouts without a privilege.
    """
    counted = torch.ones_like(batch.tokens, dtype=torch.bool)
    if batch.mask is not None:
        counted = counted & batch.mask
    if needs_reward:
        if batch.reward is None:
            raise ValueError("this method needs `reward` (B,) in the batch")
        counted = counted & broadcast(~torch.isnan(batch.reward), batch)
    if needs_privilege and batch.privileged is not None:
        counted = counted & broadcast(batch.privileged, batch)
    credit = {"counted": counted}
    if batch.logp_old is not None:
        credit["logp_old"] = batch.logp_old.detach()
    return credit


def logp_before(credit: Mapping[str, Tensor], logp: Mapping[str, Tensor]) -> Tensor:
    """The student's log-probs before the first update on the batch: `logp_old`, or without it the current ones: (N,).

    `logp` is asked only then: the trainer scores the student again where a method asks.
    """
    return credit["logp_old"] if "logp_old" in credit else logp["student"]


def place_in_rollout(batch: TokenBatch) -> Tensor:
    """0, 1, 2, ... along each rollout, in the order of the batch's tokens: (N,) int64."""
    order = torch.argsort(batch.sequence_ids, stable=True)
    ids = batch.sequence_ids[order]
    place = torch.arange(ids.shape[0], device=ids.device) - torch.searchsorted(ids, ids)
    return torch.empty_like(place).scatter_(0, order, place)
