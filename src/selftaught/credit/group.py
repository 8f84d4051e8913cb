"""Group-relative advantages: what a verifier's reward says of a rollout beside its siblings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selftaught.records import TokenBatch
from selftaught.tensors import segment_sum

STD_EPS = 1e-6
EQUAL = 1e-9  # rewards within this share of the largest are the same reward


def group_advantage(batch: TokenBatch, *, scale_by_std: bool = True) -> Tensor:
    """A = (R - mean_g) / (std_g + 1e-6), std unbiased (arXiv 2402.03300 eq. 3); R - mean_g without the scaling.

    A group of one, or whose rewards are all equal, has A = 0 exactly. A reward of NaN is no opinion: it is left
    out of the statistics and has A = 0. Returns (B,).

    Raises:
        ValueError: the batch has no `reward` or no `group`.
    """
    if batch.reward is None or batch.group is None:
        raise ValueError("a group-relative advantage needs `reward` (B,) and `group` (B,) in the batch")
    return relative(batch.reward, batch.group, scale_by_std=scale_by_std)


def relative(reward_B: Tensor, group_B: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """`group_advantage` of rewards and groups alone: (B,)."""
    known = ~torch.isnan(reward_B)
    ids = torch.unique(group_B, return_inverse=True)[1]
    groups = int(ids.max()) + 1 if ids.numel() else 0
    weight = known.to(reward_B.dtype)
    reward = torch.where(known, reward_B, torch.zeros_like(reward_B))
    count = segment_sum(weight, ids, groups)
    largest = reward.new_zeros(groups).scatter_reduce_(0, ids, reward.abs(), "amax")
    # From the smallest reward on: equal rewards deviate by exactly 0, where their float32 mean may be an ulp off.
    lowest = reward.new_full((groups,), math.inf).scatter_reduce_(0, ids[known], reward[known], "amin")
    above = torch.where(known, reward - lowest[ids], torch.zeros_like(reward))
    mean = segment_sum(above, ids, groups) / count.clamp_min(1)
    deviation = torch.where(known, above - mean[ids], torch.zeros_like(reward))
    spread = reward.new_zeros(groups).scatter_reduce_(0, ids, deviation.abs(), "amax")
    dead = (count < 2) | (spread <= EQUAL * largest.clamp_min(1))
    if scale_by_std:
        std = (segment_sum(deviation**2, ids, groups) / (count - 1).clamp_min(1)).sqrt()
        deviation = deviation / (std[ids] + STD_EPS)
    return torch.where(dead[ids] | ~known, torch.zeros_like(deviation), deviation)
