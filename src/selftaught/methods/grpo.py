"""GRPO: group-relative policy optimisation (arXiv 2402.03300)."""

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
class GRPO:
    """A rollout is reinforced by how much better it was than its siblings; no teacher.

        A    = (R - mean_g) / (std_g + 1e-6)
        rho  = exp(logp - logp_old)
        loss = -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)                      (eq. 3, without the KL)

    With `dual_clip` = c the objective is bounded below by c A where A < 0 (arXiv 1912.09729).

    Divergence: none; clipped surrogate
    Deviations: the KL to a reference, beta in the paper, is left out, as practice has since done; the mean over
    tokens belongs to the reduction (the paper: `sequence_mean`).
    Equals: dr_grpo with scale_by_std=False; dapo with eps_high=0.28; REINFORCE with group baseline when eps is None.
    Criticism: the std lifts problems that are nearly always right or wrong, the mean per rollout favours short right
    and long wrong answers (2503.20783); a group that is all right or all wrong teaches nothing.
    """

    name: ClassVar[str] = "grpo"
    arxiv: ClassVar[str] = "2402.03300"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    eps_low: float | None = 0.2  #: rho is clipped from below at 1 - eps_low; None: it is not
    eps_high: float | None = 0.2  #: rho is clipped from above at 1 + eps_high; None: it is not
    dual_clip: float | None = None  #: where A < 0 the loss is at most -dual_clip A; None: no bound
    scale_by_std: bool = True  #: divide A by the group's std

    views: ClassVar[Mapping[str, View]] = {}
    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, **CLIP, dual_clip=DUAL_CLIP)

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit = base_credit(batch, needs_reward=True)
        advantage = group_advantage(batch, scale_by_std=self.scale_by_std)
        return {**credit, "advantage": broadcast(advantage, batch)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return clipped_loss(
            student.at_sampled, credit.get("logp_old"), credit["advantage"],
            eps_low=self.eps_low, eps_high=self.eps_high, dual_clip=self.dual_clip,
        )
