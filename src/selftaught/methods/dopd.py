"""DOPD: dual on-policy distillation (arXiv 2606.30626)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import (
    STUDENT_LIGHT,
    STUDENT_WEAK,
    TEACHER_FULL,
    TEACHER_LIGHT,
    base_credit,
    evidence,
    routes,
)
from selftaught.loss import js, kl, with_tail
from selftaught.methods.fields import require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class DOPD:
    """Each token learns from a larger privileged teacher or from the privileged student, by how they compare on it.

        gap = |log T(y) - log P(y)|, sure = T(y) + P(y), P the privileged student; their means over the batch's
        counted tokens, that of gap without those above its (1 - trim) quantile

        route 0   gap < mean, sure >= mean    beta_light KL(S||T)
        route 1   gap < mean, sure < mean     beta_weak KL(S||sg[P])
        route 2   gap >= mean, T(y) >= P(y)   js(S, T), weight 1/2, over the whole vocabulary
        route 3   gap >= mean, T(y) < P(y)    beta_light KL(S||sg[P])

    Routes 0, 1, 3 on the student's top_k tokens and a bucket with the rest. Its recipe reduces by `sequence_mean`.

    Sees: a hint without the answer, both teachers
    Divergence: by route a KL on top_k tokens and a tail, or js over the whole vocabulary
    Deviations: the paper does not say what is trimmed or normalised: here the mean gap is trimmed, every token
    still trains, and probabilities are compared as they are.
    Equals: nothing else; it is 0 when every view is the student.
    Criticism: its hints come from a much larger model, and with the plain answer it did worse than with nothing; no
    code, no seeds; route 2, called the strong one, is rare by construction and weakest near agreement.
    """

    name: ClassVar[str] = "dopd"
    arxiv: ClassVar[str] = "2606.30626"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    beta_light: float = 0.6  #: weight of routes 0 and 3
    beta_weak: float = 0.3  #: weight of route 1
    top_k: int | None = 128  #: the student's likeliest tokens, beside a bucket with the rest; None: the vocabulary
    trim: float = 0.05  #: share of the largest gaps that the mean gap leaves out
    views: Mapping[str, View] = field(default_factory=lambda: {
        "teacher": View("external", "privileged"), "privileged_student": View("live", "privileged")})

    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "privileged_student"})

    def __post_init__(self) -> None:
        require(self, beta_light="[0, inf)", beta_weak="[0, inf)", trim="[0, 1)",
                top_k="int [1, inf) or None: the whole vocabulary")
        if self.views["teacher"] == self.views["privileged_student"]:
            raise ValueError(f"teacher and privileged_student are the same {self.views['teacher'].weights} model that "
                             "sees the same, so nothing tells one from the other; give the teacher other weights: "
                             "external, with `teacher: FOLDER`, or initial, ema or snapshot")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit = base_credit(batch, needs_privilege=True)
        teacher, student = logp["teacher"], logp["privileged_student"]
        return {**credit, "route": routes(teacher, student, credit["counted"], self.trim), "teacher": teacher}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        loss = torch.zeros_like(student.at_sampled)
        shares = {}
        for route, source, scale in ((TEACHER_LIGHT, "teacher", self.beta_light),
                                     (STUDENT_WEAK, "privileged_student", self.beta_weak),
                                     (TEACHER_FULL, "teacher", 1.0),
                                     (STUDENT_LIGHT, "privileged_student", self.beta_light)):
            rows = credit["route"] == route
            shares[f"route_{route}"] = rows.to(loss.dtype)
            if not rows.any():
                continue
            own, theirs = student[rows], views[source][rows]
            part = js(theirs, own) if route == TEACHER_FULL else kl(*with_tail(self.top_k, own, theirs))
            loss = loss.masked_scatter(rows, scale * part)
        gap = evidence(credit["teacher"], student.at_sampled).detach()  # the view's own has rows that no route takes
        return TokenLoss(loss, {**shares, "gap": gap})
