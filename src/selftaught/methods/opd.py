"""OPD: distillation on the student's own rollouts, by the sampled token (arXiv 2306.08543)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import base_credit, logp_before
from selftaught.loss import importance_ratio
from selftaught.methods.fields import require
from selftaught.records import Credit, TokenBatch, TokenLoss, View, privileged_views
from selftaught.tensors import MAX_LOG_RATIO, difference
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class OPD:
    """Policy gradient on how much likelier a larger teacher finds each sampled token than its writer did.

        loss = -rho sg[coef (log T(y) - logp_old(y))], unclipped

    Without `logp_old` it is the current log-prob, detached. T reads the student's own prompt; no reward. As code:
    tinker-cookbook's on-policy distillation; arXiv 2306.08543 without its sum over later
    tokens.

    Sees: the student's own prompt
    Divergence: KL(S||T) at the sampled token
    Deviations: a token that one of the two cannot say has a gap of 20 nats, not of infinity. A discounted sum of later
    gaps, 0 by default there, is left out.
    Equals: KL(S||T), in its expected gradient over y ~ S, when coef is 1.
    Criticism: one sampled token is a noisy estimate of KL(S||T); published runs start from a student that was first
    fine-tuned to write much as the teacher does; it cannot see what the teacher would have said instead.
    """

    name: ClassVar[str] = "opd"
    arxiv: ClassVar[str] = "2306.08543"
    needs: ClassVar[frozenset[str]] = frozenset()

    coef: float = 1.0  #: scale of the gap
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("external", "plain")})

    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "student"})

    def __post_init__(self) -> None:
        require(self, coef="(0, inf)")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit, teacher = base_credit(batch, needs_privilege=bool(privileged_views(self.views))), logp["teacher"]
        gap = difference(teacher, logp_before(credit, logp))
        if teacher.isinf().any():  # banned by both, whatever it was when it was sampled
            gap = torch.where(teacher.isinf() & logp["student"].isinf(), torch.zeros_like(gap), gap)
        return {**credit, "gap": torch.where(gap.isinf(), gap.sign() * MAX_LOG_RATIO, gap)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return TokenLoss(-importance_ratio(student.at_sampled, credit.get("logp_old")) * self.coef * credit["gap"])
