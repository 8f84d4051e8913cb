"""DemoPSD's theorems, where they fail, and what its gate does to rare demonstrations (arXiv 2607.02502)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from selftaught.loss import barycenter
from selftaught.methods import objective
from selftaught.report.page import Figure, Table
from selftaught.report.svg import Line
from selftaught.studies.laws.law import Check, Law, check, points
from selftaught.studies.laws.tables import (
    batch_of,
    copy_teachers,
    descend,
    distributions,
    entropy,
    kl,
    slope,
    token_loss,
)

TIGHT = 1e-9
FULL: dict[str, Any] = {"top_k": None, "floor": 0.0}
CASES = 20_000
GRID = 21  # of gamma in [0, 1]


def path(teacher: Tensor, reference: Tensor, gamma: float | Tensor) -> Tensor:
    """log q_gamma, proportional to T^gamma R^(1 - gamma); the target of blend a is q_(1 - a)."""
    return (gamma * teacher + (1 - gamma) * reference).log_softmax(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    middle = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, middle) + kl(q, middle)) / 2


def blend(reference: Tensor, teacher: Tensor, alpha_max: float, beta: float) -> Tensor:
    """a = 2 alpha_max (sigmoid(beta d) - 1/2), d the Jensen-Shannon divergence, as equation 8 prints it."""
    return 2 * alpha_max * (torch.sigmoid(beta * jensen_shannon(reference, teacher)) - 0.5)


# --- the target and theorem 1 -----------------------------------------------------------------------------------------


def target(generator: Generator) -> Law:
    """The blend weight, the target, theorem 1, and what the target does to the gradient."""
    t, r = distributions(generator, 8, 6), distributions(generator, 8, 6)
    a = blend(r, t, 0.15, 5.0)[:, None]
    closed = path(t, r, 1 - a)
    found = descend(lambda x: token_loss("demopsd", {"student": x, "teacher": t, "reference": r}, beta=5.0,
                                         **FULL).sum(), torch.zeros_like(t))
    both = torch.stack([t, r], 1)
    share = torch.cat([1 - a, a], 1)

    def two_kls(x: Tensor) -> Tensor:
        rows = {"student": x[:, None].expand(both.shape), "teacher": both}
        return (share * token_loss("sdpo", rows, top_k=None, divergence="kl_student_teacher")).sum()

    s, delta = distributions(generator, 8, 6), t - r
    log_z = ((1 - a) * t + a * r).logsumexp(-1)
    renyi = (((1 - a) * t + a * r).logsumexp(-1) / -a[:, 0])  # D of order 1 - a of T from R
    by_hand = s.exp() * ((1 - a) * (s - t - kl(s, t)[:, None]) + a * (s - r - kl(s, r)[:, None]))
    off = closed - r
    checks = [
        check("target: T^(1 - a) R^a / Z, 8 random pairs, beta 5", closed.exp(), found.exp(), "demopsd", TIGHT),
        check("it minimises (1 - a) KL(q||T) + a KL(q||R)", closed.exp(), descend(two_kls, torch.zeros_like(t)).exp(),
              "sdpo, two rows", TIGHT),
        check("the minimum is -log Z = a D(T||R) of Renyi's order 1 - a", a[:, 0] * renyi,
              share[:, 0] * kl(found, t) + share[:, 1] * kl(found, r), "demopsd", TIGHT),
        check("gradient: (1 - a) that of KL(S||T) + a that of KL(S||R)", by_hand,
              slope(lambda x: token_loss("demopsd", {"student": x, "teacher": t, "reference": r}, beta=5.0, **FULL), s),
              "demopsd", 1e-12),
        check("log B - log R = (1 - a) delta - log Z", off, (1 - a) * delta - log_z[:, None], "sum", 1e-12),
        check("centred, its square norm is (1 - a)^2 that of delta",
              (off - off.mean(-1, keepdim=True)).square().sum(-1),
              (1 - a[:, 0]) ** 2 * (delta - delta.mean(-1, keepdim=True)).square().sum(-1), "sum", 1e-12),
        check("control: uncentred, as theorem 1 has it", off.square().sum(-1),
              (1 - a[:, 0]) ** 2 * delta.square().sum(-1), "sum", 0.01, control=True),
        *_theorem_1(t, r), *_blends()]
    return Law("target", "DemoPSD's target is a reweighted pull to the teacher", [
        "B ∝ T^(1 - a) R^a with a = 2 alpha_max (sigmoid(beta d) - 1/2), d = JSD(R, T) (arXiv 2607.02502, equations 8 "
        "to 12). The gradient of KL(S||B) is (1 - a) that of KL(S||T) plus a that of KL(S||R): with R the live student "
        "the second is 0, and all that the gate does is to weigh each token by 1 - a.",
        "Theorem 1 (the leakage E[(1 - a)^2 |delta|^2] falls below E[|delta|^2]) holds by its definition; at the "
        "blends that the paper reports it is a matter of some percent.",
    ], checks, figures=[_blend_figure()])


def _blend_figure() -> Figure:
    """The blend weight by the disagreement, at the betas of the paper."""
    ds = [j * math.log(2) / 60 for j in range(61)]
    lines = [Line(f"beta = {beta}", [(d, 0.15 * math.tanh(beta * d / 2)) for d in ds], colour=colour)
             for colour, beta in enumerate(KNOWN_BLENDS)]
    return Figure("blend", "How much of the reference is blended in, by the disagreement",
                  "a at alpha_max 0.15; the largest disagreement is ln 2 nats.", lines, "Jensen-Shannon divergence")


def metrics(teacher: Tensor, reference: Tensor, **fields: Any) -> Mapping[str, Tensor]:
    """DemoPSD's own account of each pair (C, A): `alpha` and `disagreement`, (C,) each."""
    batch = batch_of(torch.zeros(teacher.shape[0], dtype=torch.int64))
    logits = {"student": reference, "teacher": teacher, "reference": reference}
    return objective("demopsd", batch, logits, **FULL, **fields).metrics


def _theorem_1(t: Tensor, r: Tensor) -> list[Check]:
    """Leakage with the gate over leakage without, and what a constant blend of the reported size does to it."""
    size = (t - r).square().sum(-1)

    def left(alpha: Tensor) -> Tensor:
        return ((1 - alpha) ** 2 * size).mean() / size.mean()

    gated = left(metrics(t, r, beta=50.0)["alpha"])
    assert gated < 1
    checks = [check("leakage left by the gate, beta 50", left(blend(r, t, 0.15, 50.0)), gated, "demopsd", 1e-12)]
    for alpha, known in ((0.033, "6.5"), (0.055, "10.7"), (0.15, "27.75")):
        constant = metrics(t, r, alpha_max=alpha, beta=1e9)["alpha"]  # so large a beta opens every gate
        checks.append(check(f"% of leakage that a constant blend of {alpha:g} removes", 100 * (1 - (1 - alpha) ** 2),
                            100 * (1 - left(constant)), "demopsd", 1e-9, known=[known]))
    return checks


DISAGREEMENTS = (0.002, 0.01, 0.026, 0.046, 0.1, 0.25, math.log(2))
KNOWN_BLENDS = {15: ".0022 .0112 .0289 .0498 .0953 .1431 .1500", 25: ".0037 .0187 .0471 .0779 .1272 .1494 .15",
                50: ".0075 .0367 .0858 .1227 .1480 .15 .15", 70: ".0105 .0505 .1082 .1385 .1497 .15 .15",
                100: ".0150 .0693 .1293 .1470 .15 .15 .15"}


def _blends() -> list[Check]:
    """Equation 8 as alpha_max tanh(beta d / 2), beside the method's own account on pairs of coins d apart."""
    half = torch.tensor([_coin(d) for d in DISAGREEMENTS], dtype=torch.float64)
    heads, tails = (torch.stack([x, -x], 1).log_softmax(-1) for x in (half, -half))
    return [check(f"blend at beta {beta}, d = .002, .01, .026, .046, .1, .25, ln 2",
                  [0.15 * math.tanh(beta * d / 2) for d in DISAGREEMENTS],
                  metrics(heads, tails, beta=float(beta))["alpha"], "demopsd", 1e-9, known=known.split())
            for beta, known in KNOWN_BLENDS.items()]


def _coin(d: float) -> float:
    """x such that coins of logits (x, -x) and (-x, x) have a Jensen-Shannon divergence of d."""
    low, high = 0.0, 40.0
    for _ in range(200):
        x = torch.tensor([(low + high) / 2, -(low + high) / 2], dtype=torch.float64).log_softmax(-1)
        low, high = (float(low + high) / 2, high) if jensen_shannon(x, x.flip(0)) < d else (low, (low + high) / 2)
    return high


# --- theorem 2 --------------------------------------------------------------------------------------------------------


def exploration(generator: Generator) -> Law:
    """Theorem 2 under its condition, and without it."""
    r = distributions(generator, CASES, 11)
    sharper = 0.5 + 2 * torch.rand(CASES, 1, dtype=torch.float64, generator=generator)
    t = (sharper * r + 0.5 * torch.randn(CASES, 11, dtype=torch.float64, generator=generator)).log_softmax(-1)
    delta, holds, heights = t - r, torch.ones(CASES, dtype=torch.bool), []
    for gamma in torch.linspace(0, 1, GRID, dtype=torch.float64):
        q = barycenter(t, r, (1 - gamma).expand(CASES))
        holds &= _moments(q, delta, r)[1] >= 0
        heights.append(entropy(q))
    falls = (torch.stack(heights).diff(dim=0) < 1e-12).all(0)
    target, step = barycenter(t, r, torch.full((CASES,), 0.15, dtype=torch.float64)), 1e-5
    variance, covariance = _moments(target, delta, r)
    ends = [entropy(barycenter(t, r, torch.full((CASES,), 0.15 + x, dtype=torch.float64))) for x in (-step, step)]
    sharper_than_teacher = entropy(target) < entropy(t)
    counts = {"cases": CASES, "meet": int(holds.sum()), "meet_and_rise": int((holds & ~falls).sum()),
              "fail_and_below_teacher": int((~holds & sharper_than_teacher).sum())}
    checks = [
        check("dH/d gamma = -gamma Var(delta) - Cov(delta, log R), at gamma 0.85",
              (-0.85 * variance - covariance)[:1000],
              ((ends[0] - ends[1]) / (2 * step))[:1000], "central difference of the target", 1e-8),
        check("condition met: cases whose entropy ever rises from R to T", 0, counts["meet_and_rise"], "barycenter", 0),
        check("condition met: cases where the target is less entropic than the teacher", 0,
              int((holds & sharper_than_teacher).sum()), "barycenter", 0),
        check("control: condition not met, share where the target is less entropic than the teacher", 0.0,
              counts["fail_and_below_teacher"] / int((~holds).sum()), "barycenter", 0.1, control=True)]
    table = Table("20,000 random pairs; the target at blend 0.15.", ("", "cases", "entropy rises somewhere from R to T",
                                                                      "target less entropic than the teacher"),
                  [(name, str(int(which.sum())), str(int((which & ~falls).sum())),
                    str(int((which & sharper_than_teacher).sum())))
                   for name, which in (("condition met", holds), ("condition not met", ~holds))])
    return Law("exploration", "DemoPSD's theorem 2 needs its condition", [
        "If Cov(delta, log R) under q_gamma is at least 0 for all gamma, entropy falls from R over the target to T "
        "(arXiv "
        "2607.02502, theorem 2). Where that fails, the target can be less entropic than the teacher alone. Both speak "
        "of one position's target, not of what a trained student's answers look like.",
    ], checks, [table], [_entropy_figure(torch.stack(heights), holds, sharper_than_teacher)], counts)


def _moments(q: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Var(delta) and Cov(delta, log R) under q."""
    p = q.exp()
    centred = delta - (p * delta).sum(-1, keepdim=True)
    return (p * centred**2).sum(-1), (p * centred * r).sum(-1)


def _entropy_figure(heights: Tensor, holds: Tensor, below: Tensor) -> Figure:
    gammas = torch.linspace(0, 1, GRID)
    kinds = (("condition met: mean", holds, 0), ("not met, target below teacher: mean", ~holds & below, 1))
    lines = [Line(name, points(gammas, (heights[:, which] - heights[-1, which]).mean(1)), colour=colour)
             for name, which, colour in kinds]
    lines.append(Line("published target, blend 0.15", [(0.85, y) for y in (-0.1, 0.4)], colour=7, dashed=True))
    return Figure("exploration", "Entropy above the teacher's, from reference to teacher", "Nats, along q_gamma ∝ "
                  "T^gamma R^(1 - gamma); below 0 it is less than the teacher's.", lines, "gamma")


# --- rare demonstrations ----------------------------------------------------------------------------------------------

KNOWN_SPLITS = {(0.0, 5.0): (".869", ".094"), (0.15, 5.0): (".8825", ".0829"), (0.9, 5.0): (".944", ".032")}


def resting(k: float, alpha_max: float, beta: float) -> tuple[Tensor, Tensor]:
    """Where the student rests under DemoPSD with itself as the reference, and the blend of each demonstration.

    The gradient is sum_k w_k (1 - a_k) that of KL(S||T_k): S is the geometric mean of the teachers with weights
    w_k (1 - a_k), where each a_k depends on S. Solved by iteration.
    """
    base, teachers, weight = copy_teachers(k, 0.1)
    s = base
    for _ in range(5000):
        a = blend(s.expand(2, 3), teachers, alpha_max, beta)
        share = weight * (1 - a)
        new = ((share[:, None] * teachers).sum(0) / share.sum()).log_softmax(-1)
        moved, s = (new - s).abs().max(), ((new + s) / 2).log_softmax(-1)
        if moved < 1e-14:
            break
    return s, a


def minority(generator: Generator) -> Law:
    """The gate on demonstrations of a rarer right answer."""
    checks, rows = [], []
    for (alpha_max, beta), known in KNOWN_SPLITS.items():
        for k in (1.5, 3.0, 9.0):
            closed, a = resting(k, alpha_max, beta)
            _, teachers, weight = copy_teachers(k, 0.1)

            def loss(x: Tensor, t: Tensor = teachers, w: Tensor = weight, a: float = alpha_max,
                     b: float = beta) -> Tensor:
                rows = x.expand(2, 3)
                views = {"student": rows, "teacher": t, "reference": rows}
                return (w * token_loss("demopsd", views, alpha_max=a, beta=b, **FULL)).sum()

            found = descend(loss, torch.zeros(3, dtype=torch.float64))
            if k == 3.0:
                checks.append(check(f"odds 3, alpha_max {alpha_max:g}, beta {beta:g}: mass of the two right answers",
                                    closed.exp()[:2], found.exp()[:2], "demopsd", 1e-9, known=known))
            rows.append((f"odds {k:g}, alpha_max {alpha_max:g}", f"{closed.exp()[0]:.4f}", f"{closed.exp()[1]:.4f}",
                         f"{found.exp()[0]:.4f}", f"{found.exp()[1]:.4f}", f"{a[0]:.4f}", f"{a[1]:.4f}"))
    lines = []
    for colour, k in enumerate((1.5, 3.0, 9.0)):
        shares = [(x / 20, _minority_share(k, x / 20)) for x in range(20)]
        lines += [Line(f"base odds {k:g}", shares, colour=colour),
                  Line(f"its share in the base, {1 / (1 + k):.2f}", [(0, 1 / (1 + k)), (0.95, 1 / (1 + k))],
                       colour=colour, dashed=True)]
    table = Table("Copying teachers, the live student as the reference, beta 5: mass of the likelier and of the rarer "
                  "right answer, and the blend of their demonstrations where the student rests.",
                  ("", "likelier", "rarer", "likelier, found", "rarer, found", "blend: likelier", "blend: rarer"), rows)
    return Law("minority", "DemoPSD's gate holds back the rarer demonstration", [
        "The demonstration of the rarer of two right answers disagrees more with the student, so it gets the larger "
        "blend and the smaller weight. On diversity between answers the gate works against what the paper claims of "
        "token entropy (arXiv 2607.02502); at its alpha_max of 0.15 the effect is small.",
    ], checks, [table], [Figure("minority", "Share of the rarer right answer by alpha_max", "Of the two right answers, "
                                "where the student rests; beta 5.", lines, "alpha_max", (0.0, 0.45))])


def _minority_share(k: float, alpha_max: float) -> float:
    s = resting(k, alpha_max, 5.0)[0].exp()
    return float(s[1] / (s[0] + s[1]))
