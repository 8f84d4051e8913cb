"""Distillation on the student's own rollouts: sampled token (OPD) and whole vocabulary (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import base_credit, evidence
from selftaught.loss import DIVERGENCES, divergence, importance_ratio
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.tensors import difference
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class OPD:
    """Policy gradient on how much likelier a larger teacher finds each sampled token than its writer did.

        loss = -rho sg[coef (log T(y) - logp_old(y))], unclipped

    Without `logp_old` it is the current log-prob, detached. T reads the student's own prompt; no reward. As code:
    tinker-cookbook's on-policy distillation; arXiv 2306.08543 without its sum over later
    tokens.

    Deviations: none; a discounted sum of later gaps, 0 by default there, is left out.
    Equals: KL(S||T), in its expected gradient over y ~ S, when coef is 1.
    """

    name: ClassVar[str] = "opd"
    arxiv: ClassVar[str] = "2306.08543"
    needs: ClassVar[frozenset[str]] = frozenset()

    coef: float = 1.0
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("external", "plain")})

    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "student"})

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit, teacher = base_credit(batch), logp["teacher"]
        gap = difference(teacher, credit.get("logp_old", logp["student"]))
        banned = teacher.isinf() & logp["student"].isinf()  # by both, whatever it was when it was sampled
        return {**credit, "gap": torch.where(banned, torch.zeros_like(gap), gap)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return TokenLoss(-importance_ratio(student.at_sampled, credit.get("logp_old")) * self.coef * credit["gap"])


@dataclass(frozen=True)
class GKD:
    """A divergence from a larger teacher on the student's own rollouts, over the whole vocabulary.

        kl_teacher_student   loss = KL(T||S)
        kl_student_teacher   loss = KL(S||T)
        js                   loss = weight KL(T||M) + (1 - weight) KL(S||M),
                             M = weight T + (1 - weight) S, 0 < weight < 1

    Both sides at the temperature. T reads the student's own prompt; no reward.

    Deviations: on-policy alone, lambda 1 in the paper. js at its ends is 0, not a KL: ask for the KL by its name.
    Equals: sdpo with top_k None when js and weight 1/2; opsd with clip None when kl_teacher_student.
    """

    name: ClassVar[str] = "gkd"
    arxiv: ClassVar[str] = "2306.13649"
    needs: ClassVar[frozenset[str]] = frozenset()

    divergence: str = "js"
    weight: float = 0.5
    temperature: float = 1.0
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("external", "plain")})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence = {self.divergence!r}: must be one of {', '.join(DIVERGENCES)}")
        if not 0 < self.weight < 1:
            raise ValueError(f"weight = {self.weight}: must be between 0 and 1; at the ends choose a kl by its name")
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}: must be above 0")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return base_credit(batch)

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        teacher, own = views["teacher"].at(self.temperature), student.at(self.temperature)
        loss = divergence(self.divergence, teacher.log_probs, own.log_probs, self.weight)
        return TokenLoss(loss, {"gap": evidence(teacher.at_sampled, own.at_sampled).detach(), "kl": loss.detach()})
