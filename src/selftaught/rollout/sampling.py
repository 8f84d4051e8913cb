"""Drawing tokens: exact inverse-transform sampling, and the optional truncations of its support."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def truncate(logits_BV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Logits with everything outside the top-k, then outside the nucleus of mass top_p, at -inf."""
    if top_k is not None and top_k < logits_BV.shape[1]:
        least = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if top_p < 1:
        ordered, index = logits_BV.sort(dim=-1, descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
        outside = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits_BV = logits_BV.masked_fill(outside, float("-inf"))
    return logits_BV


def greedy(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Temperature 0: the likeliest token of each row, and its log-prob under temperature 1 (untruncated): (B,), (B,).

    Under temperature 0 itself every log-prob would be 0, which says nothing of the model.
    """
    best = logits_BV.max(dim=-1)
    return best.indices, best.values - torch.logsumexp(logits_BV, dim=-1)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform of `uniform` in [0, 1), and its log-prob: (B,), (B,).

    A row's draw depends on its own logits and number alone. The cumulative sum is taken over blocks in float64, then
    inside one block, of which the number takes its share, so that no token is lost to rounding over a large vocabulary.
    """
    rows, vocabulary = logits_BV.shape
    probs = torch.softmax(logits_BV, dim=-1)
    if vocabulary % BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -vocabulary % BLOCK))
    blocks = probs.view(rows, -1, BLOCK)
    mass = blocks.sum(-1).double()
    ends = mass.cumsum(-1)
    target = uniform_B.double()[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), torch.zeros_like(target))
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    last = torch.searchsorted(inside, inside[:, -1:].contiguous()).clamp(max=BLOCK - 1)  # the last token of any mass
    share = (target - before) / mass.gather(1, block)
    within = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    tokens = (block * BLOCK + torch.minimum(within, last)).squeeze(1)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()
