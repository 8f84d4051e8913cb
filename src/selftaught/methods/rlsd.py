"""RLSD: self-distilled RLVR (arXiv 2604.03128)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import base_credit, broadcast, evidence, evidence_weight, group_advantage, linear_decay
from selftaught.loss import clipped_loss
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class RLSD:
    """The verifier gives each update its direction, the privileged self-teacher its size, token by token.

        A      = (R - mean_g) / (std_g + 1e-6)                                          (eq. 1)
        d      = log T(y) - log S_old(y)                                                (eq. 13)
        w      = clip(exp(sign(A) d), 1 - eps_w, 1 + eps_w)                             (eqs. 14, 15)
        lam_k  = lam max(0, 1 - k / lam_decay), k optimiser batches done
        A_t    = A ((1 - lam_k) + lam_k w)
        loss   = -min(rho A_t, clip(rho, 1 - eps_low, 1 + eps_high) A_t), dual clip c where A < 0

    Deviations: equation 16 as printed has no ratio and so no gradient; this is equation 15 with lam inside the
    clipped surrogate, as in the authors' code. d uses the log-probs before the update (the code: the current ones;
    equal with one update per batch). A rollout without privilege has w = 1.
    Equals: dapo with dual_clip=3 when lam = 0, eps_w = 0, T = S, or k >= lam_decay.
    """

    name: ClassVar[str] = "rlsd"
    arxiv: ClassVar[str] = "2604.03128"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group", "privilege"})

    eps_w: float = 0.2
    lam: float = 0.5
    lam_decay: int | None = 50
    eps_low: float | None = 0.2
    eps_high: float | None = 0.28
    dual_clip: float | None = 3.0
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("snapshot", "privileged", every=10)})

    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "student"})

    def __post_init__(self) -> None:
        if not 0 <= self.eps_w < 1:
            raise ValueError(f"eps_w = {self.eps_w}: must be in [0, 1), or a weight could change the sign of an update")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam = {self.lam}: must be in [0, 1]")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit = base_credit(batch, needs_reward=True)
        advantage = broadcast(group_advantage(batch), batch)
        gap = evidence(logp["teacher"], credit.get("logp_old", logp["student"]))
        lam = linear_decay(self.lam, batch.step, self.lam_decay)
        weight = (1 - lam) + lam * evidence_weight(gap, advantage, self.eps_w)
        if batch.privileged is not None:
            weight = torch.where(broadcast(batch.privileged, batch), weight, torch.ones_like(weight))
        return {**credit, "advantage": advantage * weight, "weight": weight, "gap": gap}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return clipped_loss(
            student.at_sampled, credit.get("logp_old"), credit["advantage"],
            eps_low=self.eps_low, eps_high=self.eps_high, dual_clip=self.dual_clip,
        )
