"""DemoPSD: disagreement-modulated policy self-distillation (arXiv 2607.02502)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence
from selftaught.loss import capped_ratio, js, kl_to_barycenter, with_tail
from selftaught.methods.fields import require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class DemoPSD:
    """Where the privileged teacher and the plain reference disagree, the target leans back to the reference.

        d    = js(R, T), weight 1/2
        a    = alpha_max tanh(beta d / 2)                                               (eq. 8)
        B    proportional to T^(1 - a) R^a                                              (eqs. 9, 11)
        loss = min(sg[rho], is_cap) KL(S||B)                                            (eq. 12)

    All on the student's top_k tokens and a bucket with the rest; log T and log R are floored at log(floor) first
    (appendix B), and only B is renormalised. T and R are the same moving average of the student, with and without
    the privileged prompt.

    Sees: a sibling that succeeded
    Divergence: KL(S||B) on top_k tokens and a tail
    Deviations: the paper states neither how tokens are averaged (here as in SDPO) nor on what d and a are taken (here
    on the floored bins). Equation 11 prints the normaliser as a sum of the normalised target; the product is meant.
    Equals: sdpo with kl_student_teacher when alpha_max = 0 or beta = 0 and the floor is inactive.
    Criticism: where R is the student, B only weighs the pull to T by 1 - a >= 0.85, with the same goal; the mean a
    reported is about 0.04; beta is tuned per domain, without seeds or error bars; of two right ways the rarer
    demonstrated one disagrees more, and is held back more.
    """

    name: ClassVar[str] = "demopsd"
    arxiv: ClassVar[str] = "2607.02502"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    alpha_max: float = 0.15  #: the largest share of the reference in the target
    beta: float = 50.0  #: how soon disagreement brings that share about
    top_k: int | None = 100  #: the student's likeliest tokens, beside a bucket with the rest; None: the vocabulary
    floor: float = 1e-8  #: T and R are raised to at least this; 0: they are not
    is_cap: float | None = 2.0  #: the largest ratio that weighs a stale token; None: no cap
    views: Mapping[str, View] = field(default_factory=lambda: {
        "teacher": View("ema", "privileged", rate=0.05), "reference": View("ema", "plain", rate=0.05)})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, alpha_max="[0, 1]", beta="[0, inf)", top_k="int [1, inf) or None: the whole vocabulary",
                floor="[0, 1)", is_cap="(0, inf) or None: no cap")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return base_credit(batch, needs_privilege=True)

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        own, teacher, reference = with_tail(self.top_k, student, views["teacher"], views["reference"])
        disagreement = js(reference, teacher, floor=self.floor)
        alpha = self.alpha_max * (self.beta * disagreement / 2).tanh()
        distance = kl_to_barycenter(own, teacher, reference, alpha, self.floor)
        loss = capped_ratio(student.at_sampled, credit.get("logp_old"), self.is_cap) * distance
        gap = evidence(views["teacher"].at_sampled, student.at_sampled).detach()
        return TokenLoss(loss, {"gap": gap, "kl": distance.detach(), "alpha": alpha, "disagreement": disagreement})
