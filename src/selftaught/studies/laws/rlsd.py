"""RLSD's increment over GRPO beside SDPG's distillation term (arXiv 2604.03128, 2606.04036)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from selftaught.methods import objective
from selftaught.report.page import Figure, Table
from selftaught.report.svg import Line
from selftaught.studies.laws.law import Check, Law, check, points
from selftaught.studies.laws.tables import batch_of, descend, distributions, every_outcome, kl, slope, token_loss

TIGHT = 1e-12
LAM, EPS_W = 0.5, 0.2  # RLSD's published weight and clip
BETA = 1e-3  # SDPG's published weight
SIZE = 0.5 / (math.sqrt(0.5) + 1e-6)  # |A| in a group of one right and one wrong rollout


def phi(d: Tensor, sign: float, eps_w: float = EPS_W) -> Tensor:
    """sign (clip(exp(sign d), 1 - eps_w, 1 + eps_w) - 1): what RLSD adds to an advantage, over lam |A|."""
    return sign * (torch.exp(sign * d).clamp(1 - eps_w, 1 + eps_w) - 1)


def advantages(d: Tensor, **fields: Any) -> Tensor:
    """RLSD's own reweighted advantages (2, n) of a right and of a wrong rollout, whose tokens have evidence d (n,)."""
    n = len(d)
    # A coin on which the teacher is exactly d above the student: log T(y) - log S(y) = d.
    student = torch.full_like(d, -30.0 - 1e-9)
    logits = {"student": torch.stack([student, torch.log1p(-student.exp())], 1),
              "teacher": torch.stack([student + d, torch.log1p(-(student + d).exp())], 1)}
    rows = {view: x.repeat(2, 1) for view, x in logits.items()}
    batch = batch_of(torch.zeros(2 * n, dtype=torch.int64), torch.tensor([1.0, 0.0]).double().repeat_interleave(n),
                     torch.arange(n).repeat(2))
    return objective("rlsd", batch, rows, lam_decay=None, **fields).credit["advantage"].reshape(2, n)


def expected_update(name: str, logits: Tensor, teacher: Tensor, sign: float, **fields: Any) -> Tensor:
    """-E_(y ~ S) of the gradient of the method's loss, the rollout right (+1) or wrong (-1): (C, A).

    Each outcome is a group of one right and one wrong rollout, of which one is looked at.
    """
    reward = torch.tensor([1.0, 0.0]).double() if sign > 0 else torch.tensor([0.0, 1.0]).double()
    c, a = logits.shape

    def loss(x: Tensor) -> Tensor:
        rows, outcome, p = every_outcome(x)
        views: dict[str, Tensor] = {"student": rows[:, :, None].expand(c, a, 2, a)}
        if name != "grpo":
            views |= {"teacher": teacher[:, None, None], "reference": teacher[:, None, None]}
        group = torch.arange(c * a).reshape(c, a, 1).expand(c, a, 2)
        each = token_loss(name, views, outcome[:, None], reward=reward, group=group, **fields)
        return p * each[..., 0]

    return -slope(loss, logits)


def increments(generator: Generator) -> Law:
    """What the privileged teacher adds to GRPO's update in each of the two methods."""
    grid = torch.linspace(-3, 3, 121, dtype=torch.float64)
    checks: list[Check] = []
    for row, sign in enumerate((1.0, -1.0)):
        added = advantages(grid, lam=LAM)[row] - sign * SIZE
        checks.append(check(f"A {'>' if sign > 0 else '<'} 0: what is added to A, lam |A| phi(d)",
                            LAM * SIZE * phi(grid, sign), added, "rlsd", 1e-9))
        same = torch.sign(added[grid.abs() > 0.01]) == torch.sign(grid[grid.abs() > 0.01])
        checks.append(check("it has the sign of d", 1.0, same.double().mean(), "rlsd", 0))
    z, teacher = distributions(generator, 8, 6), distributions(generator, 8, 6)
    checks += _directions(z, teacher)
    base, t, r = distributions(generator, 8, 6), teacher, torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.float64)
    found, std = _sdpg(base, t, r, 0.5, 0.3), math.sqrt(4 / 15) + 1e-6
    closed = ((r / std + 0.5 * t + 0.3 * base) / 0.8).log_softmax(-1)
    checks.append(check("SDPG's optimum at beta 0.5, alpha 0.3: (e^(R / std) T^beta base^alpha)^(1 / (alpha + beta))",
                        closed.exp(), found.exp(), "sdpg", 1e-9))
    table, data = _distances(generator, checks)
    near = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    lines = [Line("RLSD, A > 0", points(near, phi(near, 1)), colour=0),
             Line("RLSD, A < 0", points(near, phi(near, -1)), colour=1),
             Line("d itself: first order, and SDPG at one sampled token", points(near, near), colour=7, dashed=True)]
    return Law("increments", "RLSD adds a clipped, sampled pull to the teacher, hundreds of times SDPG's", [
        "RLSD's advantage is A + lam |A| phi(d), d = log T(y) - log S(y): for either sign of A it adds what has the "
        "sign "
        "of d, and to first order lam |A| d, whose expectation is lam |A| times -grad KL(S||T). SDPG adds beta times "
        "that gradient itself, over the whole vocabulary (arXiv 2604.03128 equations 13 to 15; 2606.04036 equation "
        "3.2).",
        f"So the teacher does enter RLSD's direction, and not its size alone; what bounds it is the clip and the decay "
        f"of lam. At the published values lam |A| is {LAM * SIZE / BETA:.0f} times beta in a group of one right and "
        f"one "
        "wrong rollout.",
    ], checks, [table], [Figure("increments", "What is added to the advantage, over lam |A|", "By the evidence d; clip "
                                "0.2.", lines, "d, nats")], data)


def _directions(z: Tensor, teacher: Tensor) -> list[Check]:
    """Expected updates in the logits, from sums over all outcomes."""
    s = z.exp()
    d = teacher - z
    checks = []
    for sign in (1.0, -1.0):
        added = expected_update("rlsd", z, teacher, sign, lam=LAM, lam_decay=None) - expected_update("grpo", z, teacher,
                                                                                                    sign)
        weight = s * LAM * SIZE * phi(d, sign)
        checks.append(check(f"A {'>' if sign > 0 else '<'} 0: the expected update that RLSD adds, lam |A| E[phi grad]",
                            weight - s * weight.sum(-1, keepdim=True), added, "rlsd less grpo", TIGHT))
    alone = expected_update("grpo", z, teacher, 1.0)
    checks.append(check("control: RLSD on praise keeps GRPO's expected direction (which is 0 for one A)", alone,
                        expected_update("rlsd", z, teacher, 1.0, lam=LAM, lam_decay=None), "rlsd", 1e-3, control=True))
    near = (z + 0.05 * d).log_softmax(-1)  # near enough that a clip of 0.9 does not bind
    praise = expected_update("rlsd", z, near, 1.0, lam=1.0, lam_decay=None, eps_w=0.9)
    checks.append(check("praise, unclipped, lam 1: -|A| grad KL(T||S) = |A| (T - S)", SIZE * (near.exp() - s), praise,
                        "rlsd", TIGHT))
    term = expected_update("sdpg", z, teacher, 1.0, **_sdpg_fields(0.5)) - alone
    checks.append(check("SDPG's term: -beta grad KL(S||T)", -0.5 * s * (z - teacher - kl(z, teacher)[:, None]), term,
                        "sdpg less grpo", TIGHT))
    w = torch.tensor([0.3, 0.9, 1.1, 5.0], dtype=torch.float64)
    ours = advantages(-w.log(), lam=1.0)[1] / SIZE
    checks.append(check("blame at w = 0.3, 0.9, 1.1, 5 by equation 15", [-0.8, -0.9, -1.1, -1.2], ours, "rlsd", 1e-9,
                        known=["-0.8", "-0.9", "-1.1", "-1.2"]))
    checks.append(check("control: by equation 16 as printed", torch.minimum(-w, -w.clamp(0.8, 1.2)), ours, "rlsd", 1.0,
                        control=True))
    return checks


def _sdpg_fields(beta: float) -> dict[str, Any]:
    return {"beta": beta, "beta_warmup": 0, "beta_decay": 0, "alpha": 0.0}


def _sdpg(base: Tensor, teacher: Tensor, reward: Tensor, beta: float, alpha: float) -> Tensor:
    def loss(x: Tensor) -> Tensor:
        rows, outcome, p = every_outcome(x)
        views = {"student": rows, "teacher": teacher[:, None], "reference": base[:, None]}
        group = torch.arange(x.shape[0])[:, None].expand(p.shape)
        fields = {**_sdpg_fields(beta), "alpha": alpha, "gate": "all"}
        return (p * token_loss("sdpg", views, outcome, reward=reward, group=group, **fields)).sum() / (alpha + beta)

    return descend(loss, base)


def _distances(generator: Generator, checks: list[Check]) -> tuple[Table, dict[str, Any]]:
    """RLSD's added update over that of SDPG's term, as the teacher moves away from the student; adds one check."""
    z, off = distributions(generator, 200, 6), torch.randn(200, 6, dtype=torch.float64, generator=generator)
    rows, ratios = [], []
    for far in (0.01, 0.1, 0.3, 1.0, 3.0):
        teacher = (z + far * off).log_softmax(-1)
        alone = expected_update("grpo", z, teacher, 1.0)
        added = expected_update("rlsd", z, teacher, 1.0, lam=LAM, lam_decay=None) - alone
        term = expected_update("sdpg", z, teacher, 1.0, **_sdpg_fields(BETA)) - alone
        d = teacher - z
        cosine = (added * term).sum(-1) / (added.norm(dim=-1) * term.norm(dim=-1))
        ratio = added.norm(dim=-1).mean() / term.norm(dim=-1).mean()
        clipped = (z.exp() * ((d > math.log(1 + EPS_W)) | (d < math.log(1 - EPS_W)))).sum(-1).mean()
        rows.append((f"{far:g}", f"{kl(z, teacher).mean():.2g}", f"{added.norm(dim=-1).mean():.2g}",
                     f"{term.norm(dim=-1).mean():.2g}", f"{ratio:.0f}", f"{cosine.mean():.3f}", f"{clipped:.1%}"))
        ratios.append(float(ratio))
    checks.append(check("ratio of the two near the student: lam |A| / beta, to 1 %", LAM * SIZE / BETA, ratios[0],
                        "rlsd, sdpg", 0.01 * LAM * SIZE / BETA))
    return Table("Praise; 200 random pairs at published values: size of the expected update that each method's teacher "
                 "adds to GRPO's.", ("distance of logits", "KL(S||T)", "RLSD adds", "SDPG adds", "ratio", "cosine",
                                     "tokens clipped"), rows), {"ratio": ratios}
