"""Which teacher a token is given to, by how the two privileged ones agree on it."""

from __future__ import annotations

import torch
from torch import Tensor

from selftaught.tensors import LOCAL, Reducer, difference

TEACHER_LIGHT, STUDENT_WEAK, TEACHER_FULL, STUDENT_LIGHT = range(4)
LARGEST = 1e6  # nats: a teacher that holds the token at -inf is this far away, so that quantiles stay numbers


def routes(teacher_N: Tensor, student_N: Tensor, counted_N: Tensor, trim: float, reducer: Reducer = LOCAL) -> Tensor:
    """0..3 for each token, from log-probs of the sampled token under the privileged teacher and student: (N,) int64.

    gap = |log T(y) - log P(y)|, its mean over the counted tokens up to the (1 - trim) quantile;
    sure = T(y) + P(y), its mean over all counted tokens (arXiv 2606.30626, which leaves open
    what of its outliers is dropped: here they are left out of the mean gap alone).

        gap < mean:   0 where sure >= mean, 1 elsewhere
        gap >= mean:  2 where T(y) >= P(y), 3 elsewhere
    """
    gap = difference(teacher_N, student_N).abs().clamp(max=LARGEST)
    sure = teacher_N.exp() + student_N.exp()
    kept = counted_N & (gap <= reducer.quantile(gap[counted_N], 1 - trim))
    agree = gap < _mean(gap, kept, reducer)
    confident = sure >= _mean(sure, counted_N, reducer)
    low = torch.where(confident, TEACHER_LIGHT, STUDENT_WEAK)
    high = torch.where(teacher_N >= student_N, TEACHER_FULL, STUDENT_LIGHT)
    return torch.where(agree, low, high)


def _mean(values_N: Tensor, where_N: Tensor, reducer: Reducer) -> Tensor:
    total, count = reducer.sum(values_N[where_N].sum()), reducer.sum(where_N.sum())
    return total / count.clamp_min(1)
