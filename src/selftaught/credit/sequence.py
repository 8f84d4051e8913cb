"""One importance ratio for a whole rollout."""

from __future__ import annotations

from torch import Tensor

from selftaught.records import TokenBatch
from selftaught.tensors import MAX_LOG_RATIO, difference, segment_mean


def sequence_ratio(logp_N: Tensor, logp_old_N: Tensor, counted_N: Tensor, batch: TokenBatch) -> Tensor:
    """exp(mean_t(logp - logp_old)) over the counted tokens of each rollout, given to each of its tokens: (N,).

    The mean is clamped to +-20 (arXiv 2507.18071 eq. 7).
    """
    count = int(batch.sequence_ids.max()) + 1 if batch.sequence_ids.numel() else 0
    mean = segment_mean(difference(logp_N, logp_old_N), batch.sequence_ids, count, counted_N)
    return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[batch.sequence_ids]
