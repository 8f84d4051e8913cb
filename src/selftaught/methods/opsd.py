"""OPSD: on-policy self-distillation (arXiv 2601.18734, version 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence
from selftaught.loss import clipped_kl
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class OPSD:
    """The student is drawn, over the whole vocabulary, to what it would have said had it seen the solution.

        loss = sum_v min(T_v log(T_v / S_v), clip), both sides at the temperature; clip None: KL(T||S)

    T is the initial policy with the privileged prompt, S the student; y is drawn from the student. No reward.

    Deviations: none from version 3; version 1 minimised a generalised JSD. A capped summand has no gradient, so
    the update may turn against the teacher (T = (.6, .4), S = (.4, .6), clip .05): set clip=None to be sure of KL.
    Equals: sdft with skip=0, and gkd with kl_teacher_student, when clip is None and temperature is 1.
    """

    name: ClassVar[str] = "opsd"
    arxiv: ClassVar[str] = "2601.18734"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    clip: float | None = 0.05
    temperature: float = 1.1
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("initial", "privileged")})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}: must be above 0")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip = {self.clip}: must be above 0, or None for no clipping")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return base_credit(batch, needs_privilege=True)

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        teacher, own = views["teacher"].at(self.temperature), student.at(self.temperature)
        distillation = clipped_kl(teacher.log_probs, own.log_probs, self.clip)
        gap = evidence(teacher.at_sampled, own.at_sampled).detach()
        return TokenLoss(distillation, {"gap": gap, "kl": distillation.detach()})
