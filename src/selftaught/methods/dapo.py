"""DAPO and Dr. GRPO: two mends of GRPO's surrogate (arXiv 2503.14476, 2503.20783)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, broadcast, group_advantage
from selftaught.loss import clipped_loss
from selftaught.methods.fields import CLIP, DUAL_CLIP, require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class DAPO:
    """GRPO with a clip that leaves unlikely tokens more room to rise.

        A    = (R - mean_g) / (std_g + 1e-6)                                            (eq. 9)
        rho  = exp(logp - logp_old)
        loss = -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)                      (eq. 8), dual clip where A < 0

    Its recipe reduces by `token_mean`.

    Divergence: none; clipped surrogate
    Deviations: what the paper does beside the loss is the recipe's: drawing again for groups that are all right or all
    not (eq. 11) is `rollout.filter_groups: right`, the penalty of overlong rollouts (eq. 13) the reward `length`,
    leaving them out of the loss `rollout.mask_truncated`.
    Equals: grpo with eps_high=0.28; rlsd with lam=0 when dual_clip is 3.
    Criticism: in verl's reproduction (AIME24) the mean over tokens adds 6 points (44 to 50), drawing again 2 (to 52).
    """

    name: ClassVar[str] = "dapo"
    arxiv: ClassVar[str] = "2503.14476"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    eps_low: float | None = 0.2  #: rho is clipped from below at 1 - eps_low; None: it is not
    eps_high: float | None = 0.28  #: rho is clipped from above at 1 + eps_high; None: it is not
    dual_clip: float | None = None  #: where A < 0 the loss is at most -dual_clip A; None: no bound

    views: ClassVar[Mapping[str, View]] = {}
    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, **CLIP, dual_clip=DUAL_CLIP)

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return {**base_credit(batch, needs_reward=True), "advantage": broadcast(group_advantage(batch), batch)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return clipped_loss(
            student.at_sampled, credit.get("logp_old"), credit["advantage"],
            eps_low=self.eps_low, eps_high=self.eps_high, dual_clip=self.dual_clip,
        )


@dataclass(frozen=True)
class DrGRPO:
    """GRPO without its two divisors: neither easy or hard problems nor short rollouts weigh more.

        A    = R - mean_g
        rho  = exp(logp - logp_old)
        loss = -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)

    Its recipe reduces by `constant`, with the longest response allowed as `length`.

    Divergence: none; clipped surrogate
    Deviations: none.
    Equals: grpo with scale_by_std=False.
    Criticism: its step grows with the rewards' scale and shrinks with `length`: rates do not carry over from grpo.
    """

    name: ClassVar[str] = "dr_grpo"
    arxiv: ClassVar[str] = "2503.20783"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    eps_low: float | None = 0.2  #: rho is clipped from below at 1 - eps_low; None: it is not
    eps_high: float | None = 0.2  #: rho is clipped from above at 1 + eps_high; None: it is not

    views: ClassVar[Mapping[str, View]] = {}
    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, **CLIP)

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        advantage = group_advantage(batch, scale_by_std=False)
        return {**base_credit(batch, needs_reward=True), "advantage": broadcast(advantage, batch)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return clipped_loss(
            student.at_sampled, credit.get("logp_old"), credit["advantage"],
            eps_low=self.eps_low, eps_high=self.eps_high,
        )
