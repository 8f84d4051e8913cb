"""SDPO: self-distillation from a sibling's success or the verifier's feedback (arXiv 2601.20802)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence
from selftaught.loss import DIVERGENCES, capped_ratio, divergence, with_tail
from selftaught.methods.fields import require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class SDPO:
    """The student is drawn to what its own average over time says once it has seen what went right or wrong.

        loss = min(sg[rho], is_cap) D(T, S) on the student's top_k tokens and a bucket with the rest

    D is js (weight 1/2), kl_student_teacher or kl_teacher_student; T is an exponential moving average of the
    student with the privileged prompt. A rollout without privilege is masked.

    Sees: a sibling that succeeded, or the verifier's feedback
    Divergence: js or a KL, on top_k tokens and a tail
    Deviations: the mean over tokens belongs to the reduction (the authors' code: over each micro-batch).
    Equals: gkd with js and weight 1/2 when top_k is None and the batch on-policy.
    Criticism: a group without a success, and a lone success, learn nothing; users report collapse after some hundred
    steps and demonstrations learnt by heart; no clear gain below some 1.5B parameters; worse than grpo in one of the
    authors' own five domains on both models; frozen and averaged teachers come out nearly equal.
    """

    name: ClassVar[str] = "sdpo"
    arxiv: ClassVar[str] = "2601.20802"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    divergence: str = "js"  #: js, kl_student_teacher or kl_teacher_student
    top_k: int | None = 100  #: the student's likeliest tokens, beside a bucket with the rest; None: the vocabulary
    is_cap: float | None = 2.0  #: the largest ratio that weighs a stale token; None: no cap
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("ema", "privileged", rate=0.05)})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, divergence=f"one of {', '.join(DIVERGENCES)}",
                top_k="int [1, inf) or None: the whole vocabulary", is_cap="(0, inf) or None: no cap")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return base_credit(batch, needs_privilege=True)

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        teacher = views["teacher"]
        own, theirs = with_tail(self.top_k, student, teacher)
        distance = divergence(self.divergence, theirs, own)
        loss = capped_ratio(student.at_sampled, credit.get("logp_old"), self.is_cap) * distance
        gap = evidence(teacher.at_sampled, student.at_sampled).detach()
        return TokenLoss(loss, {"gap": gap, "kl": distance.detach()})
