"""GKD: distillation on the student's own rollouts, over the whole vocabulary (arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, evidence
from selftaught.loss import DIVERGENCES, divergence
from selftaught.methods.fields import require
from selftaught.records import Credit, TokenBatch, TokenLoss, View, privileged_views
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class GKD:
    """A divergence from a larger teacher on the student's own rollouts, over the whole vocabulary.

        kl_teacher_student   loss = KL(T||S)
        kl_student_teacher   loss = KL(S||T)
        js                   loss = weight KL(T||M) + (1 - weight) KL(S||M),
                             M = weight T + (1 - weight) S, 0 < weight < 1

    Both sides at the temperature. T reads the student's own prompt; no reward.

    Sees: the student's own prompt
    Divergence: js or a KL, over the whole vocabulary
    Deviations: on-policy alone, lambda 1 in the paper. js at its ends is 0, not a KL: ask for the KL by its name.
    Equals: sdpo with top_k None when js and weight 1/2; opsd with clip None when kl_teacher_student.
    Criticism: as weight nears 0 or 1 the js vanishes, so that weight 0.9 trains far less than 1 would; frameworks
    make 0 and 1 two KLs, and disagree on whether the sampling temperature is also the loss's.
    """

    name: ClassVar[str] = "gkd"
    arxiv: ClassVar[str] = "2306.13649"
    needs: ClassVar[frozenset[str]] = frozenset()

    divergence: str = "js"  #: js, kl_student_teacher or kl_teacher_student
    weight: float = 0.5  #: of the teacher in js
    temperature: float = 1.0  #: divides the logits of both sides
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("external", "plain")})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, divergence=f"one of {', '.join(DIVERGENCES)}", temperature="(0, inf)",
                weight="(0, 1); at the ends choose a kl by its name")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        seen = bool(privileged_views(self.views))
        return base_credit(batch, needs_privilege=seen)

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        teacher, own = views["teacher"].at(self.temperature), student.at(self.temperature)
        loss = divergence(self.divergence, teacher, own, self.weight)
        return TokenLoss(loss, {"gap": evidence(teacher.at_sampled, own.at_sampled).detach(), "kl": loss.detach()})
