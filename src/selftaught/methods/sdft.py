"""SDFT: self-distillation from a demonstration (arXiv 2601.19897)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence, place_in_rollout
from selftaught.loss import kl
from selftaught.methods.fields import require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class SDFT:
    """The student is drawn to what its own average over time says with a demonstration before it.

        loss = KL(T||S), both sides at the temperature                                  (README's erratum of the code)

    T is an exponential moving average of the student with the privileged prompt; the first `skip` tokens of each
    rollout, where T likes to speak of the demonstration, are not counted. Its recipe reduces by `sequence_mean`.

    Sees: a demonstration
    Divergence: KL(T||S) over the whole vocabulary
    Deviations: the paper derives KL(S||T); its published runs, by the authors' erratum, used KL(T||S). Their weight per
    sequence, the mean of its tokens' ratios to vLLM's probabilities, each capped at 2, is left out.
    Equals: opsd with clip None at temperature 1, and gkd with kl_teacher_student, when skip is 0.
    Criticism: the paper's reading of it as inverse RL needs the KL that its runs did not use; it lost against plain
    fine-tuning at 3B; on the authors' code another team found a frozen teacher as good as the average.
    """

    name: ClassVar[str] = "sdft"
    arxiv: ClassVar[str] = "2601.19897"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    skip: int = 3  #: tokens at the beginning of a rollout that are not counted
    temperature: float = 1.0  #: divides the logits of both sides
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("ema", "privileged", rate=0.01)})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, skip="int [0, inf)", temperature="(0, inf)")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit = base_credit(batch, needs_privilege=True)
        return {**credit, "counted": credit["counted"] & (place_in_rollout(batch) >= self.skip)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        teacher, own = views["teacher"].at(self.temperature), student.at(self.temperature)
        loss = kl(teacher, own)
        return TokenLoss(loss, {"gap": evidence(teacher.at_sampled, own.at_sampled).detach(), "kl": loss.detach()})
