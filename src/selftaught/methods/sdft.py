"""SDFT: self-distillation from a demonstration (arXiv 2601.19897)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence, place_in_rollout
from selftaught.loss import kl
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class SDFT:
    """The student is drawn to what its own average over time says with a demonstration before it.

        loss = KL(T||S), both sides at the temperature                                  (README's erratum of the code)

    T is an exponential moving average of the student with the privileged prompt; the first `skip` tokens of each
    rollout, where T likes to speak of the demonstration, are not counted. Its recipe reduces by `sequence_mean`.

    Deviations: the paper derives KL(S||T); its published runs, by the authors' erratum, used KL(T||S).
    Equals: opsd with clip None at temperature 1, and gkd with kl_teacher_student, when skip is 0.
    """

    name: ClassVar[str] = "sdft"
    arxiv: ClassVar[str] = "2601.19897"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    skip: int = 3
    temperature: float = 1.0
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("ema", "privileged", rate=0.01)})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise ValueError(f"skip = {self.skip}: must be 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}: must be above 0")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit = base_credit(batch, needs_privilege=True)
        return {**credit, "counted": credit["counted"] & (place_in_rollout(batch) >= self.skip)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        teacher, own = views["teacher"].at(self.temperature), student.at(self.temperature)
        loss = kl(teacher.log_probs, own.log_probs)
        return TokenLoss(loss, {"gap": evidence(teacher.at_sampled, own.at_sampled).detach(), "kl": loss.detach()})
