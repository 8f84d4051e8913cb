"""What K teachers ask of one student: logarithmic and arithmetic pools (arXiv 2606.26091, section 5)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from selftaught.methods import Several, build
from selftaught.report.page import Figure, Table
from selftaught.report.svg import Line
from selftaught.studies.laws.law import Check, Law, check
from selftaught.studies.laws.tables import batch_of, copy_teachers, descend, distributions, entropy, kl
from selftaught.vocabulary import TokenDist

TIGHT = 1e-9
ODDS, EPS = 3.0, 0.1


def by_several(method: str, combine: Literal["average", "mixture"], teachers: Tensor, weight: Tensor,
               **fields: Any) -> Tensor:
    """argmin over S of the expected loss of `method` with K teachers at a time: log-probs (C, A).

    teachers (C, M, K, A): M draws of K teachers each, of probability `weight` (C, M).
    """
    c, m, k, a = teachers.shape
    several = Several(build(method, **fields), k, combine)
    batch = batch_of(torch.zeros(c * m, dtype=torch.int64))
    has = torch.ones(c * m, dtype=torch.bool)
    credit = {"counted": has, **{f"has.{j}": has for j in range(k)}, **{f"{j}.counted": has for j in range(k)}}
    views = {f"teacher.{j}" if j else "teacher": TokenDist(teachers[:, :, j].reshape(c * m, a), batch.tokens)
             for j in range(k)}

    def loss(x: Tensor) -> Tensor:
        student = TokenDist(x[:, None].expand(c, m, a).reshape(c * m, a), batch.tokens)
        return (weight * several.loss(student, views, credit).loss.reshape(c, m)).sum()

    return descend(loss, torch.zeros(c, a, dtype=torch.float64))


def pooling(generator: Generator) -> Law:
    """Averaged losses and averaged probabilities of several teachers."""
    teachers = distributions(generator, 8, 1, 3, 6, std=1.5)
    one = torch.ones(8, 1, dtype=torch.float64)
    arithmetic = (teachers.exp().mean(2))[:, 0]
    geometric = teachers.mean(2)[:, 0].log_softmax(-1)
    reverse: dict[str, Any] = {"divergence": "kl_student_teacher", "top_k": None}
    forward = {**reverse, "divergence": "kl_teacher_student"}
    js = {**reverse, "divergence": "js"}
    averaged = by_several("sdpo", "average", teachers, one, **reverse)
    checks = [
        check("three losses KL(S||T_k), averaged: geometric mean", geometric.exp(), averaged.exp(), "sdpo, average",
              TIGHT),
        check("three losses KL(T_k||S), averaged: arithmetic mean", arithmetic,
              by_several("sdpo", "average", teachers, one, **forward).exp(), "sdpo, average", TIGHT),
        check("their mixture with KL(S||T): arithmetic mean", arithmetic,
              by_several("sdpo", "mixture", teachers, one, **reverse).exp(), "sdpo, mixture", TIGHT),
        check("their mixture with js: arithmetic mean", arithmetic,
              by_several("sdpo", "mixture", teachers, one, **js).exp(), "sdpo, mixture", 1e-7),
        check("control: averaged KL(S||T_k) leads to the arithmetic mean", arithmetic, averaged.exp(), "sdpo, average",
              0.01, control=True),
    ]
    checks += _demonstrations_at_a_time(reverse)
    between = by_several("sdpo", "average", teachers, one, **js)
    table = Table("Where three random teachers lead: means over 8 tables.", ("", "entropy, nats",
                  "KL to the arithmetic mean", "KL to the geometric mean"),
                  [(name, f"{entropy(x).mean():.4f}", f"{abs(kl(x, arithmetic.log()).mean()):.4f}",
                    f"{abs(kl(x, geometric).mean()):.4f}")
                   for name, x in (("geometric mean", averaged), ("js, averaged (no closed form)", between),
                                   ("arithmetic mean", arithmetic.log()))])
    return Law("pooling", "Averaged losses pool teachers by the product, averaged probabilities by the sum", [
        "Of averaged KL(S||T_k) the optimum is the normalised geometric mean (a product of experts: one teacher's veto "
        "is enough), of averaged KL(T_k||S), or of any divergence to the mixture of the T_k, the arithmetic mean.",
        "So K demonstrations at a time with their losses averaged have the optimum of one at a time (arXiv 2606.26091 "
        "finds K = 3 no help); a mixture of K moves it from the geometric towards the arithmetic mean: of base odds 3 "
        f"it makes {mixture_odds(1):.1f} with one, {mixture_odds(3):.1f} with three and {mixture_odds(8):.1f} with "
        f"eight.",
    ], checks, tables=[table], figures=[_figure()])


def mixed(k: int, odds: float, eps: float) -> tuple[Tensor, Tensor]:
    """Copying teachers, K demonstrations at a time: log mixtures by how many of the K show the likelier answer.

    Returns log probs (K + 1, A) and the binomial weights (K + 1,).
    """
    _, teachers, weight = copy_teachers(odds, eps)
    p, q = weight.tolist()
    count = torch.arange(k + 1, dtype=torch.float64)[:, None] / k
    logs = (count * teachers[0].exp() + (1 - count) * teachers[1].exp()).log()
    return logs, torch.tensor([math.comb(k, n) * p**n * q ** (k - n) for n in range(k + 1)], dtype=torch.float64)


def _odds(logp: Tensor) -> float:
    return float((logp[..., 0] - logp[..., 1]).exp())


def mixture_odds(k: int) -> float:
    """Of the two right answers at the optimum of KL(S || mixture of K copying teachers), ODDS in the base."""
    logs, weight = mixed(k, ODDS, EPS)
    return _odds((weight[:, None] * logs).sum(0))


def _demonstrations_at_a_time(reverse: dict[str, Any]) -> list[Check]:
    teachers = copy_teachers(ODDS, EPS)[1]
    checks = []
    for k in (1, 3, 8):
        counts = range(k + 1)
        shown = torch.stack([torch.stack([teachers[0]] * n + [teachers[1]] * (k - n)) for n in counts])[None]
        binomial = mixed(k, ODDS, EPS)[1][None]
        if k <= 3:
            found = by_several("sdpo", "average", shown, binomial, **reverse)
            checks.append(check(f"odds 3, copying teachers, {k} at a time, losses averaged", mixture_odds(1),
                                _odds(found), "sdpo, average", 1e-8, known=["9.216"]))
        found = by_several("sdpo", "mixture", shown, binomial, **reverse)
        checks.append(check(f"odds 3, copying teachers, {k} at a time, mixed", mixture_odds(k), _odds(found),
                            "sdpo, mixture", 1e-8))
    return checks


def _figure() -> Figure:
    ks = list(range(1, 33))
    lines = [Line("losses averaged, KL(S||T)", [(k, mixture_odds(1)) for k in ks], colour=0),
             Line("probabilities mixed, KL(S||T)", [(k, mixture_odds(k)) for k in ks], colour=1),
             Line("the base, and KL(T||S)", [(ks[0], ODDS), (ks[-1], ODDS)], colour=2, dashed=True)]
    return Figure("pooling", "Odds of the likelier answer by demonstrations at a time",
                  "Copying teachers, base odds 3: what K teachers at a time lead to.", lines, "K", (0.0, 10.0), True)
