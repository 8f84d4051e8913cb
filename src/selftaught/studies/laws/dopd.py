"""DOPD's routes: how many tokens each gets, and how hard each pulls (arXiv 2606.30626)."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from selftaught.methods import objective
from selftaught.report.page import Figure, Table
from selftaught.report.svg import Line
from selftaught.studies.laws.law import Check, Law, check
from selftaught.studies.laws.tables import batch_of, distributions, kl, slope, token_loss

TIGHT = 1e-12
TOKENS, A = 20_000, 32
ROUTES = ("0: agree, sure: 0.6 KL(S||T)", "1: agree, unsure: 0.3 KL(S||P)", "2: teacher ahead: js(S, T)",
          "3: student ahead: 0.6 KL(S||P)")
SHARP = 2.0  # standard deviation of the logits
PAIRS = {"same family": 0.42, "further apart": 1.0, "unrelated": math.inf}  # distance of the two in the logits


def triple(generator: Generator, distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Deployed student, teacher with and student with the privilege: log-probs (TOKENS, A)."""
    z = SHARP * torch.randn(TOKENS, A, dtype=torch.float64, generator=generator)
    own, other, off = (torch.randn(TOKENS, A, dtype=torch.float64, generator=generator) for _ in range(3))
    if math.isinf(distance):
        teacher, privileged = SHARP * other, z + 0.3 * own
    else:
        teacher, privileged = z + distance * other, z + distance * own
    return (z + 0.3 * off).log_softmax(-1), teacher.log_softmax(-1), privileged.log_softmax(-1)


def measured(student: Tensor, teacher: Tensor, privileged: Tensor, generator: Generator) -> dict[str, Tensor]:
    """DOPD's routes (N,) and gradients in the logits (N, A), on tokens that the privileged student writes."""
    tokens = torch.multinomial(privileged.exp(), 1, generator=generator)[:, 0]
    x = student.clone().requires_grad_()
    views = {"student": x, "teacher": teacher, "privileged_student": privileged}
    out = objective("dopd", batch_of(tokens), views, top_k=None)
    (grad,) = torch.autograd.grad(out.token_loss.sum(), x)
    t, p = (view.gather(1, tokens[:, None])[:, 0] for view in (teacher, privileged))
    gap = (t - p).abs()
    kept = gap <= torch.quantile(gap, 0.95)
    return {"route": out.credit["route"], "grad": grad, "gap": gap, "mean": gap[kept].mean(),
            "sure": (t.exp() + p.exp()).mean()}


def pull_kl(s: Tensor, t: Tensor) -> Tensor:
    """The gradient of KL(S||T) in the student's logits: S (log(S / T) - KL(S||T))."""
    return s.exp() * (s - t - kl(s, t)[:, None])


def pull_js(s: Tensor, t: Tensor) -> Tensor:
    """That of js(S, T): S (log(S / M) - KL(S||M)) / 2."""
    middle = ((s.exp() + t.exp()) / 2).log()
    return pull_kl(s, middle) / 2


def expected_shares(teacher: Tensor, privileged: Tensor, gap: Tensor, sure: Tensor) -> Tensor:
    """Shares of the four routes at these thresholds, summed over every token by its probability: (4,)."""
    signed, both = teacher - privileged, teacher.exp() + privileged.exp()
    high = signed.abs() >= gap
    masks = (~high & (both >= sure), ~high & (both < sure), high & (signed >= 0), high & (signed < 0))
    return torch.stack([(privileged.exp() * mask).sum(-1).mean() for mask in masks])


def routing(generator: Generator) -> Law:
    """Shares, gradient norms, and what turns routes off."""
    checks, rows, data = [], [], {}
    for name, distance in PAIRS.items():
        s, t, p = triple(generator, distance)
        out = measured(s, t, p, generator)
        share = torch.stack([(out["route"] == r).double().mean() for r in range(4)])
        expected = expected_shares(t, p, out["mean"], out["sure"])
        checks.append(check(f"{name}: shares of routes 0, 1, 2, 3 of 20,000 sampled tokens", expected, share, "dopd",
                            0.015))
        by_hand = torch.stack([0.6 * pull_kl(s, t), 0.3 * pull_kl(s, p), pull_js(s, t), 0.6 * pull_kl(s, p)])
        size, instead = by_hand.norm(dim=-1), 0.6 * pull_kl(s, t).norm(dim=-1)
        routed = [out["route"] == r for r in range(4)]
        norms = [float(out["grad"].norm(dim=-1)[which].mean()) for which in routed]
        checks.append(check(f"{name}: mean gradient norm of routes 0, 1, 2, 3",
                            [size[r][which].mean() for r, which in enumerate(routed)], norms, "dopd", TIGHT))
        bound = math.exp(-float(out["mean"]))
        assert float(expected[2]) <= bound
        rows.append((name, f"{out['mean']:.2f}", f"{out['gap'].mean():.2f}", *(f"{x:.1%}" for x in share),
                     f"{bound:.1%}", *(f"{x:.3f}" for x in norms), f"{instead[routed[2]].mean():.3f}"))
        data[name] = {"shares": share.tolist(), "norms": norms, "kl_on_route_2": float(instead[routed[2]].mean())}
        checks.append(check(f"control: {name}, js pulls as hard on route 2 as 0.6 KL(S||T) would",
                            instead[routed[2]].mean(), norms[2], "dopd", 0.02, control=True))
    checks += [*_curvature(generator), *_switched_off(generator)]
    columns = ("pair", "mean gap, trimmed", "mean gap", *(f"share {r}" for r in range(4)), "share 2 at most",
               *(f"norm {r}" for r in range(4)), "norm 2 with 0.6 KL")
    return Law("routing", "DOPD's strong route is rare by construction, and the weakest near agreement", [
        "Tokens go by gap = |log T(y) - log P(y)| and confidence, against their batch's means (arXiv 2606.30626): "
        + "; ".join(ROUTES) + ".",
        "For y written by P, E[T(y) / P(y)] = 1, so by Markov's inequality at most exp(-mean gap) of the tokens reach "
        "route 2; route 3 has no such bound. Per unit of chi-square a js of weight 1 curves 1/8, 0.6 KL 0.30.",
        "An empty privilege turns routes 1 and 3 off without a word: P is then the student, and both value and "
        "gradient "
        "are 0. With one network as both there is no gap at all, and every token falls to route 2.",
    ], checks, [Table("Synthetic pairs of 20,000 positions and 32 tokens, tokens written by the privileged student.",
                      columns, rows)], [_figure(generator)], data)


def _curvature(generator: Generator) -> list[Check]:
    """Loss over chi-square as the source nears the student, route by route."""
    s = distributions(generator, 1, A)
    off = torch.randn(1, A, dtype=torch.float64, generator=generator)
    near = (s + 1e-4 * off).log_softmax(-1)
    chi_square = ((near.exp() - s.exp()) ** 2 / s.exp()).sum(-1)
    each = [token_loss("sdpo", {"student": s, "teacher": near}, top_k=None, divergence=name)
            for name in ("kl_student_teacher", "js")]
    found = [0.6 * each[0] / chi_square, 0.3 * each[0] / chi_square, each[1] / chi_square]
    return [check("loss over chi-square near agreement: routes 0 and 3, 1, 2", [0.3, 0.15, 0.125], torch.cat(found),
                  "sdpo's divergences", 1e-4),
            check("js over KL near agreement", 0.25, each[1] / each[0], "sdpo's divergences", 1e-4, known=["0.2500"])]


def _switched_off(generator: Generator) -> list[Check]:
    s, t, _ = (x[:500] for x in triple(generator, 0.7))
    tokens = torch.multinomial(s.exp(), 1, generator=generator)[:, 0]
    views = {"student": s, "teacher": t, "privileged_student": s}
    route = objective("dopd", batch_of(tokens), views, top_k=None).credit["route"]
    own = (route == 1) | (route == 3)

    def loss(x: Tensor) -> Tensor:
        return token_loss("dopd", {**views, "student": x}, tokens, top_k=None)

    size = slope(loss, s).norm(dim=-1)
    alone = {"student": s, "teacher": t, "privileged_student": t}
    lone = objective("dopd", batch_of(tokens), alone, top_k=None).credit["route"]
    return [check("empty privilege: loss of routes 1 and 3", torch.zeros(int(own.sum())), loss(s)[own], "dopd", 1e-14),
            check("and their gradient norm", torch.zeros(int(own.sum())), size[own], "dopd", 1e-14),
            check("control: that of routes 0 and 2", 0.0, size[~own].mean(), "dopd", 1e-2, control=True),
            check("one network as both: share of route 2", 1.0, (lone == 2).double().mean(), "dopd", 0)]


def _figure(generator: Generator) -> Figure:
    """Shares by the mean gap, as teacher and privileged student drift apart."""
    shares, bound = [], []
    for distance in (0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0, 3.0):
        s, t, p = (x[:4000] for x in triple(generator, distance))
        out = measured(s, t, p, generator)
        mean = float(out["mean"])
        shares.append((mean, expected_shares(t, p, out["mean"], out["sure"]).tolist()))
        bound.append((mean, math.exp(-mean)))
    lines = [Line(name, [(mean, share[r]) for mean, share in shares], colour=r) for r, name in enumerate(ROUTES)]
    return Figure("routing", "Shares of the four routes by the mean gap", "As the two privileged models drift apart; "
                  "dashed: the bound on route 2.", [*lines, Line("exp(-mean gap)", bound, colour=7, dashed=True)],
                  "mean gap, nats", (0.0, 1.0))
