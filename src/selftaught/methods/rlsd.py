"""RLSD: self-distilled RLVR (arXiv 2604.03128)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import (
    base_credit,
    broadcast,
    evidence,
    evidence_weight,
    group_advantage,
    linear_decay,
    logp_before,
)
from selftaught.loss import clipped_loss
from selftaught.methods.fields import CLIP, DUAL_CLIP, require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class RLSD:
    """The verifier gives each update its direction, the privileged self-teacher its size, token by token.

        A      = (R - mean_g) / (std_g + 1e-6)                                          (eq. 1)
        d      = log T(y) - log S_old(y)                                                (eq. 13)
        w      = clip(exp(sign(A) d), 1 - eps_w, 1 + eps_w)                             (eqs. 14, 15)
        lam_k  = lam max(0, 1 - k / lam_decay), k steps (rollout batches) done
        A_t    = A ((1 - lam_k) + lam_k w)
        loss   = -min(rho A_t, clip(rho, 1 - eps_low, 1 + eps_high) A_t), dual clip c where A < 0

    Sees: the answer
    Divergence: none; log T(y) - log S(y)
    Deviations: equation 16 as printed has no ratio and so no gradient; this is equation 15 with lam inside the
    clipped surrogate, as in the authors' code. d uses the log-probs before the update (the code: the current ones;
    equal with one update per batch). A rollout without privilege has w = 1.
    Equals: dapo with dual_clip=3 when lam = 0, eps_w = 0, T = S, or k >= lam_decay.
    Criticism: a weight changes an advantage by at most 10 % at first and by nothing after lam_decay; on text others
    found it level with a good grpo or below it; the gap lies more on words of style than on those of the task
    (2606.11709), and its inverse has been reported to help too (2605.10781).
    """

    name: ClassVar[str] = "rlsd"
    arxiv: ClassVar[str] = "2604.03128"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group", "privilege"})

    eps_w: float = 0.2  #: w stays within 1 - eps_w and 1 + eps_w
    lam: float = 0.5  #: share of w in the weight, at step 0
    lam_decay: int | None = 50  #: steps in which that share falls to 0; 0 or None: it stays
    eps_low: float | None = 0.2  #: rho is clipped from below at 1 - eps_low; None: it is not
    eps_high: float | None = 0.28  #: rho is clipped from above at 1 + eps_high; None: it is not
    dual_clip: float | None = 3.0  #: where A_t < 0 the loss is at most -dual_clip A_t; None: no bound
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("snapshot", "privileged", every=10)})

    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "student"})

    def __post_init__(self) -> None:
        require(self, **CLIP, dual_clip=DUAL_CLIP, lam="[0, 1]", lam_decay="int [0, inf) or None: no decay",
                eps_w="[0, 1)")  # from 1 on a weight could change the sign of an update

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit = base_credit(batch, needs_reward=True)
        advantage = broadcast(group_advantage(batch), batch)
        gap = evidence(logp["teacher"], logp_before(credit, logp))
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
