"""DemoPSD: disagreement-modulated policy self-distillation (arXiv 2607.02502)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence
from selftaught.loss import barycenter, capped_ratio, floored, js, kl, with_tail
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class DemoPSD:
    """Where the privileged teacher and the plain reference disagree, the target leans back to the reference.

        d    = js(R, T), weight 1/2
        a    = alpha_max tanh(beta d / 2)                                               (eq. 8)
        B    proportional to T^(1 - a) R^a                                              (eqs. 9, 11)
        loss = min(sg[rho], is_cap) KL(S||B)                                            (eq. 12)

    All on the student's top_k tokens and a bucket with the rest; log T and log R are floored at log(floor) first,
    and only B is renormalised (appendix B). T and R are the same moving average of the student, with and without
    the privileged prompt.

    Deviations: none. Equation 11 prints the normaliser as a sum of the normalised target; the product is meant.
    Equals: sdpo with kl_student_teacher when alpha_max = 0 or beta = 0 and the floor is inactive.
    """

    name: ClassVar[str] = "demopsd"
    arxiv: ClassVar[str] = "2607.02502"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    alpha_max: float = 0.15
    beta: float = 50.0
    top_k: int | None = 100
    floor: float = 1e-8
    is_cap: float | None = 2.0
    views: Mapping[str, View] = field(default_factory=lambda: {
        "teacher": View("ema", "privileged", rate=0.05), "reference": View("ema", "plain", rate=0.05)})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_max <= 1:
            raise ValueError(f"alpha_max = {self.alpha_max}: must be in [0, 1]")
        if not self.beta >= 0:
            raise ValueError(f"beta = {self.beta}: must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1, or None for the whole vocabulary")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor = {self.floor}: must be in [0, 1); 0 is no floor")
        if self.is_cap is not None and self.is_cap <= 0:
            raise ValueError(f"is_cap = {self.is_cap}: must be above 0, or None for no cap")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return base_credit(batch, needs_privilege=True)

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        own, *theirs = with_tail(self.top_k, student.log_probs, views["teacher"].log_probs,
                                 views["reference"].log_probs)
        teacher, reference = floored(self.floor, *theirs, alive=own)
        disagreement = js(reference, teacher)
        alpha = self.alpha_max * (self.beta * disagreement / 2).tanh()
        distance = kl(own, barycenter(teacher, reference, alpha))
        loss = capped_ratio(student.at_sampled, credit.get("logp_old"), self.is_cap) * distance
        gap = evidence(views["teacher"].at_sampled, student.at_sampled).detach()
        return TokenLoss(loss, {"gap": gap, "kl": distance.detach(), "alpha": alpha, "disagreement": disagreement})
