"""OPSD: on-policy self-distillation (arXiv 2601.18734, version 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence
from selftaught.loss import clipped_kl
from selftaught.methods.fields import require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class OPSD:
    """The student is drawn, over the whole vocabulary, to what it would have said had it seen the solution.

        loss = sum_v min(T_v log(T_v / S_v), clip), both sides at the temperature; clip None: KL(T||S)

    T is the initial policy with the privileged prompt, S the student; y is drawn from the student. No reward.

    Sees: a reference solution
    Divergence: KL(T||S) over the whole vocabulary, summands clipped
    Deviations: none from version 3; version 1 minimised a generalised JSD. clip is published as 0.05 or 0.06 for a
    teacher that thinks, 1e-6 or 1e-7 for one that does not. A capped summand has no gradient, so the update may turn
    against the teacher (T = (.6, .4), S = (.4, .6), clip .05): set clip=None to be sure of KL.
    Equals: sdft with skip=0, and gkd with kl_teacher_student, when clip is None and temperature is 1.
    Criticism: others find that it peaks within some 20 steps and then declines, while mentions of an unseen reference
    rise (2604.03128); pure self-distillation collapsed a 1.7B model in another's run (2606.04036). Its direction
    changed between versions, and the first release left the chat template out of the student's prompt.
    """

    name: ClassVar[str] = "opsd"
    arxiv: ClassVar[str] = "2601.18734"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    clip: float | None = 0.05  #: the most that one token of the vocabulary adds to the sum; None: no bound
    temperature: float = 1.1  #: divides the logits of both sides
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("initial", "privileged")})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, temperature="(0, inf)", clip="(0, inf) or None: no clipping")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return base_credit(batch, needs_privilege=True)

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        teacher, own = views["teacher"].at(self.temperature), student.at(self.temperature)
        distillation = clipped_kl(teacher, own, self.clip)
        gap = evidence(teacher.at_sampled, own.at_sampled).detach()
        return TokenLoss(distillation, {"gap": gap, "kl": distillation.detach()})
