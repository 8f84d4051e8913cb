"""GSPO and CISPO: GRPO with another importance ratio (arXiv 2507.18071, 2506.13585)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import base_credit, broadcast, group_advantage, logp_before, sequence_ratio
from selftaught.loss import capped_ratio, clip_ratio, clipped, importance_ratio
from selftaught.methods.fields import CLIP, require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class GSPO:
    """One ratio for a whole rollout, as the reward is one for a whole rollout.

        s    = exp(mean_t(logp - logp_old)), the mean over the rollout's counted tokens   (eq. 7)
        s_t  = sg[s] exp(logp - sg[logp])                                                 (eq. 14)
        loss = -min(s_t A, clip(s_t, 1 - eps_low, 1 + eps_high) A)                        (eq. 5)

    So every token's loss has the value of its rollout's, and the mean over the rollout has the gradient of
    -min(s A, clip(s) A). Its recipe reduces by `sequence_mean`.

    Divergence: none; clipped surrogate
    Deviations: none.
    Equals: grpo with the same clip on rollouts of one token, and on-policy.
    Criticism: with one update per batch the ratio is 1, and nothing of the method is left but its reduction.
    """

    name: ClassVar[str] = "gspo"
    arxiv: ClassVar[str] = "2507.18071"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    eps_low: float | None = 3e-4  #: s is clipped from below at 1 - eps_low; None: it is not
    eps_high: float | None = 4e-4  #: s is clipped from above at 1 + eps_high; None: it is not

    views: ClassVar[Mapping[str, View]] = {}
    scores: ClassVar[frozenset[str]] = frozenset({"student"})

    def __post_init__(self) -> None:
        require(self, **CLIP)

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit = base_credit(batch, needs_reward=True)
        ratio = sequence_ratio(logp["student"], logp_before(credit, logp), credit["counted"], batch)
        return {**credit, "advantage": broadcast(group_advantage(batch), batch), "ratio": ratio}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        rho = credit["ratio"] * importance_ratio(student.at_sampled, None)
        clip = {"eps_low": self.eps_low, "eps_high": self.eps_high}
        return TokenLoss(clipped(rho, credit["advantage"], **clip), clip_ratio(rho, credit["advantage"], **clip))


@dataclass(frozen=True)
class CISPO:
    """REINFORCE with a capped, constant ratio: no token is clipped out of the gradient.

        A    = (R - mean_g) / (std_g + 1e-6)
        loss = -sg[min(rho, cap)] A logp, rho = exp(logp - logp_old)                    (eqs. 4, 5)

    Its recipe reduces by `token_mean`.

    Divergence: none; REINFORCE with a capped ratio
    Deviations: the paper's lower bound of the ratio is left out, as the paper does in its runs.
    Equals: grpo without clip in gradient, though not in value, when cap is infinite.
    Criticism: nobody agrees on the cap (5 in TRL's advice, 1.2 in verl's example); on-policy it does nothing.
    """

    name: ClassVar[str] = "cispo"
    arxiv: ClassVar[str] = "2506.13585"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    cap: float = 5.0  #: the largest ratio that a token's gradient is multiplied by

    views: ClassVar[Mapping[str, View]] = {}
    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, cap="(0, inf]")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return {**base_credit(batch, needs_reward=True), "advantage": broadcast(group_advantage(batch), batch)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        logp = student.at_sampled
        possible = torch.where(logp.isinf(), torch.zeros_like(logp), logp)  # a banned token has no gradient to give
        ratio, advantage = capped_ratio(logp, credit.get("logp_old"), None), credit["advantage"]
        over = (ratio > self.cap) & (advantage != 0)
        return TokenLoss(-ratio.clamp(max=self.cap) * advantage * possible, {"clip_ratio": over.to(ratio.dtype)})
