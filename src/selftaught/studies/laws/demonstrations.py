"""Laws of self-distillation from sampled demonstrations, and of reinforcement learning beside it (arXiv 2606.26091)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from selftaught.report.page import Figure, Table
from selftaught.report.svg import Line
from selftaught.studies.laws.law import Check, Law, check, numbers, points
from selftaught.studies.laws.tables import (
    copy_teachers,
    descend,
    distributions,
    every_outcome,
    kl,
    token_loss,
)

TIGHT = 1e-9
SDPG: dict[str, Any] = {"beta": 1.0, "beta_warmup": 0, "beta_decay": 0, "gate": "all"}  # T everywhere, at weight 1


def tilted(base: Tensor, teachers: Tensor, weight: Tensor, beta: float) -> Tensor:
    """log pi*, proportional to base exp(E[i] / (1 + beta)), i(y; y') = log T(y|y') - log base(y) (prop. 2).

    base (..., A), teachers (..., K, A), weight (..., K).
    """
    return (base + expected_pcmi(base, teachers, weight) / (1 + beta)).log_softmax(-1)


def expected_pcmi(base: Tensor, teachers: Tensor, weight: Tensor) -> Tensor:
    """E over demonstrations of the pointwise conditional mutual information i(y; y'): (..., A)."""
    return (weight[..., None] * (teachers - base[..., None, :])).sum(-2)


def by_sdpg(base: Tensor, teachers: Tensor, weight: Tensor, beta: float) -> Tensor:
    """argmin of E[KL(S||T)] + beta KL(S||base), by SDPG's loss: its distillation, and its penalty as alpha."""

    def loss(x: Tensor) -> Tensor:
        rows, outcome, p = every_outcome(x)
        rows, p = rows[..., None, :, :], p[..., None, :]  # (C, K, A, A), (C, K, A)
        views = {"student": rows.expand(*teachers.shape[:-1], *rows.shape[-2:]), "teacher": teachers[..., None, :],
                 "reference": base[..., None, None, :]}
        return (p * weight[..., None] * token_loss("sdpg", views, outcome, alpha=beta, **SDPG)).sum() / (1 + beta)

    return descend(loss, torch.zeros_like(base))


def by_distillation(name: str, base: Tensor, teachers: Tensor, weight: Tensor, **fields: Any) -> Tensor:
    """argmin of a method's expected divergence over the vocabulary, without a KL to the base."""

    def loss(x: Tensor) -> Tensor:
        views = {"student": x[..., None, :].expand(teachers.shape), "teacher": teachers}
        return (weight * token_loss(name, views, **fields)).sum()

    return descend(loss, torch.zeros_like(base))


by_sdpo = partial(by_distillation, "sdpo", divergence="kl_student_teacher", top_k=None)


# --- the optimum of self-distillation ---------------------------------------------------------------------------------


def optimum(generator: Generator) -> Law:
    """Propositions 2 and 5, remark 1, and what follows from them."""
    base, teachers = distributions(generator, 8, 6), distributions(generator, 8, 3, 6)
    weight = distributions(generator, 8, 3).exp()
    checks = []
    for beta in (0.0, 0.5, 3.0):
        closed, found = tilted(base, teachers, weight, beta), by_sdpg(base, teachers, weight, beta)
        checks.append(check(f"optimum at beta = {beta:g}, 8 random tables", closed.exp(), found.exp(), "sdpg", TIGHT))
    k, i = base[:, 0] - base[:, 1], expected_pcmi(base, teachers, weight)
    ratio = (k + (i[:, 0] - i[:, 1]) / 4).exp()
    checks.append(check("ratio of two outcomes at beta = 3: k exp(E[i1 - i2] / 4)", ratio,
                        (found[:, 0] - found[:, 1]).exp(), "sdpg", TIGHT))
    geometric = (weight[..., None] * teachers).sum(-2).log_softmax(-1)
    checks.append(check("beta = 0 is the geometric mean of the teachers", geometric.exp(),
                        by_sdpo(base, teachers, weight).exp(), "sdpo", TIGHT))
    checks.append(check("beta = 1e6 is the base", base.exp(), by_sdpg(base, teachers, weight, 1e6).exp(), "sdpg", 1e-5))
    blind = base[:, None].expand_as(teachers)
    checks.append(check("a teacher blind to its demonstration leaves the base", base.exp(),
                        by_sdpg(base, blind, weight, 0.5).exp(), "sdpg", TIGHT))
    checks += [*_reward_blind(base, teachers, weight), _bayes(generator), *_token_level(generator)]
    return Law("optimum", "The optimum of self-distillation tilts the base by what demonstrations make likely", [
        "min E[KL(S || T(. | y'))] + beta KL(S || base) has the optimum S ∝ base exp(E[i(y; y')] / (1 + beta)), "
        "i(y; y') = log T(y | y') - log base(y) (arXiv 2606.26091, propositions 2 and 5, remark 1). The reward does "
        "not "
        "occur in it: it enters only through which answers are shown.",
        "At beta = 0 it is the geometric mean of the teachers: an answer keeps its mass only if every likely "
        "demonstration supports it.",
    ], checks, figures=[_tilt_figure(generator)])


def _reward_blind(base: Tensor, teachers: Tensor, weight: Tensor) -> list[Check]:
    """The labels of what is not demonstrated move nothing in self-distillation, and move what SDPG's reward term does.
    """

    def by(reward: Tensor, penalty: float) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            rows, outcome, p = every_outcome(x)
            student = rows[:, None].expand(8, 3, 6, 6)
            if penalty:
                views = {"student": student, "teacher": teachers[..., None, :], "reference": base[:, None, None]}
                each = token_loss("sdpg", views, outcome, reward=reward, alpha=penalty, **SDPG) / (1 + penalty)
            else:
                views = {"student": student, "teacher": teachers[..., None, :]}
                each = token_loss("sdpo", views, outcome, reward=reward, top_k=None, divergence="kl_student_teacher")
            return (p[:, None] * weight[..., None] * each).sum()

        return descend(loss, torch.zeros_like(base)).exp()

    labels = [torch.tensor(right, dtype=torch.float64) for right in ([1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 1])]
    one, other = labels
    return [check("other labels for what is not demonstrated", by(one, 0.0), by(other, 0.0), "sdpo", 1e-15),
            check("control: the same with the reward in the loss", by(one, 1.0), by(other, 1.0), "sdpg", 0.01,
                  control=True)]


def _bayes(generator: Generator) -> Check:
    """Teachers of one consistent joint: E[i(y; y')] = -KL(base || J(. | y)) <= 0 for every answer y."""
    joint = distributions(generator, 200, 25).reshape(200, 5, 5)  # log J(y, y'), symmetric: y' is drawn as y is
    joint = torch.logaddexp(joint, joint.transpose(1, 2)) - math.log(2)
    base = joint.logsumexp(2)
    teachers = (joint - base[:, None, :]).transpose(1, 2)  # (C, y', y): J(y, y') / base(y')
    found = expected_pcmi(base, teachers, base.exp())
    closed = -kl(base[:, None, :], joint - base[:, :, None])
    assert (found <= 1e-12).all()
    return check("E[i] under a consistent joint is -KL(base || J(y'|y)): never above 0", closed, found,
                 "sum over demonstrations", 1e-12)


def _token_level(generator: Generator) -> list[Check]:
    """Proposition 5 on trees of two tokens: the optimum prefix by prefix, and the sequence-level one beside it."""
    beta, a, k = 0.5, 3, 3
    sequence, weight = distributions(generator, 1 + k, a * a), distributions(generator, k).exp()
    tree = sequence.reshape(1 + k, a, a)
    first = tree.logsumexp(2)
    prefixes = torch.cat([first[:, None], tree - first[..., None]], 1).transpose(0, 1)  # (prefix, base and teachers, a)
    base, teachers = prefixes[:, 0], prefixes[:, 1:]
    every = weight.expand(1 + a, k)
    closed, found = tilted(base, teachers, every, beta), by_sdpg(base, teachers, every, beta)
    whole = tilted(sequence[0], sequence[1:], weight, beta)
    assembled = (found[0, :, None] + found[1:]).flatten()
    return [check("token level: the optimum of each prefix of a tree of two tokens", closed.exp(), found.exp(), "sdpg",
                  TIGHT),
            check("control: the token-level optimum is that of whole sequences", whole.exp(), assembled.exp(), "sdpg",
                  1e-3, control=True)]


def _tilt_figure(generator: Generator) -> Figure:
    base, teachers = distributions(generator, 1, 12), distributions(generator, 1, 3, 12)
    weight = distributions(generator, 1, 3).exp()
    i = expected_pcmi(base, teachers, weight)[0]
    lines = []
    for colour, beta in enumerate((0.0, 1.0, 3.0)):
        change = (by_sdpg(base, teachers, weight, beta) - base)[0]
        offset = float((change - i / (1 + beta)).mean())
        ends = numbers(torch.stack([i.min() - 0.5, i.max() + 0.5]))
        lines += [Line(f"beta = {beta:g}, found", points(i, change), colour=colour),
                  Line(f"beta = {beta:g}, slope 1 / (1 + beta)", [(x, x / (1 + beta) + offset) for x in ends],
                       colour=colour, dashed=True)]
    return Figure("optimum", "The tilt", "log pi*(y) - log base(y) of twelve answers, by their expected information.",
                  lines, "E[i(y; y')], nats")


# --- reinforcement learning keeps ratios ------------------------------------------------------------------------------


def ratios(generator: Generator) -> Law:
    """Proposition 1, and why a policy gradient without a KL does not keep what it says."""
    base = distributions(generator, 8, 6)
    reward = torch.stack([torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.float64).roll(c) for c in range(8)])
    right, group = reward > 0, torch.arange(8)[:, None].expand(8, 6)
    std = math.sqrt(6 * 0.25 / 5) + 1e-6  # the group's, by which the advantage is divided
    checks = []
    for beta in (0.1, 0.5, 2.0):

        def loss(x: Tensor, alpha: float = beta / std) -> Tensor:
            rows, outcome, p = every_outcome(x)
            views = {"student": rows, "teacher": rows.detach(), "reference": base[:, None, :]}
            each = token_loss("sdpg", views, outcome, reward=reward, group=group, alpha=alpha, beta=0.0)
            return (p * each).sum() / alpha

        found = descend(loss, base)
        closed = (base + reward / beta).log_softmax(-1)
        checks.append(check(f"optimum at beta = {beta:g}, 8 random tables", closed.exp(), found.exp(), "sdpg, beta 0",
                            TIGHT))
    kept = [torch.stack([(x[c][right[c]][0] - x[c][right[c]][1]).exp() for c in range(8)]) for x in (base, found)]
    across = [torch.stack([(x[c][right[c]][0] - x[c][~right[c]][0]).exp() for c in range(8)]) for x in (base, found)]
    checks += [check("ratio of two right answers: the base's", kept[0], kept[1], "sdpg, beta 0", TIGHT),
               check("ratio of a right to a wrong answer: the base's times exp(1 / beta)", across[0] * math.exp(0.5),
                     across[1], "sdpg, beta 0", 1e-8)]
    tilts = by_sdpg(*copy_teachers(3, 0.1), 1.0)
    checks.append(check("control: self-distillation keeps the ratio 3 of two right answers", 3.0,
                        (tilts[0] - tilts[1]).exp(), "sdpg", 1.0, control=True))
    path, table = _path()
    return Law("ratios", "Reinforcement learning with a KL keeps the ratios of equally right answers", [
        "max E[R] - beta KL(S || base) has the optimum S ∝ base exp(R / beta) (arXiv 2606.26091, proposition 1): two "
        "answers of equal reward keep their ratio exactly.",
        "That is said of the optimum. Without a KL every distribution over right answers is optimal, and the path "
        "chooses: the gradient in the logits lets the likelier right answer grow faster. On base (0.6, 0.2, 0.2), the "
        "first two right, exp(-z2) - exp(-z1) is constant along it, so that the ratio is known at each reward.",
    ], [*checks, *path], [table], [_ratio_figure()])


START = (0.6, 0.2, 0.2)  # the first two are right


def _ratio_figure() -> Figure:
    """How the ratio of the two right answers moves on the way to reward 1."""
    start = torch.tensor(START, dtype=torch.float64).log()
    start = start - start.mean()
    rewards = [0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 0.995, 0.999]
    ends = (rewards[0], rewards[-1])
    return Figure("ratios", "The ratio of two right answers, by the expected reward",
                  "It begins at 3. log10: 1 is ten to one.", [
        Line("plain gradient, no KL", [(r, math.log10(_ratio_on_path(start, r))) for r in rewards], colour=0),
        Line("natural gradient, no KL; optimum with a KL", [(r, math.log10(3)) for r in ends], colour=1),
    ], "expected reward")  # fmt: skip


def _path() -> tuple[list[Check], Table]:
    """Gradient ascent on the expected reward in the logits, from (3 : 1 : 1) with the first two right."""
    start = torch.tensor(START, dtype=torch.float64).log()
    start = start - start.mean()
    reward = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)

    def climb(z: Tensor) -> Tensor:
        x = z.clone().requires_grad_()
        rows, outcome, p = every_outcome(x)
        each = token_loss("dr_grpo", {"student": rows}, outcome, reward=reward)
        return -torch.autograd.grad((p * each).sum(), x)[0]

    def reached(z: Tensor) -> float:
        return float((z.softmax(-1) * reward).sum())

    z, natural, rows, checks = start, start, [], []
    for goal in (0.9, 0.99, 0.999):
        while reached(z) < goal:
            size = 0.03 / (1 - reached(z))
            z = z + size * climb(z + size / 2 * climb(z))  # midpoint steps: nearly the continuous path
        while reached(natural) < goal:
            natural = natural + 0.1 * climb(natural) / natural.softmax(-1)
        closed, found = _ratio_on_path(start, reached(z)), float((z[0] - z[1]).exp())
        checks.append(check(f"without a KL: the ratio 3 when the reward has reached {goal:g}", closed, found,
                            "dr_grpo, plain gradient", 1e-3 * closed))
        kept = float((natural[0] - natural[1]).exp())
        rows.append((f"{goal:g}", f"{kept:.3f}", f"{closed:.3f}", f"{found:.3f}"))
    checks.append(check("without a KL, by the natural gradient: the ratio stays", 3.0, kept, "dr_grpo", TIGHT))
    columns = ("reward", "natural gradient", "plain gradient, closed form", "plain gradient, found")
    return checks, Table("Ratio of two right answers that begins at 3, without a KL to the base.", columns, rows)


def _ratio_on_path(start: Tensor, reward: float) -> float:
    """Where exp(-z2) - exp(-z1) and the sum of z are as at the start, and the expected reward is `reward`."""
    z1, z2, z3 = start.tolist()
    constant, total = math.exp(-z2) - math.exp(-z1), z1 + z2 + z3
    low, high = z1, z1 + 60
    for _ in range(200):
        a = (low + high) / 2
        b = -math.log(constant + math.exp(-a))
        right, wrong = math.exp(a) + math.exp(b), math.exp(total - a - b)
        low, high = (a, high) if right / (right + wrong) < reward else (low, a)
    return math.exp(a - b)


# --- the teacher that copies ------------------------------------------------------------------------------------------

KNOWN = {1.5: ("2.381", "1.890", "1.5"), 3.0: ("9.216", "5.258", "3.0"), 9.0: ("53.15", "21.87", "9.0")}


def copying(generator: Generator) -> Law:
    """Two right answers of base ratio k, and teachers that copy what they are shown."""
    checks: list[Check] = []
    for k, (at_0, at_1, forward) in KNOWN.items():
        base, teachers, weight = copy_teachers(k, 0.1)
        arithmetic = (weight[:, None] * teachers.exp()).sum(0)
        found = by_sdpo(base, teachers, weight)
        checks.append(_ratio(f"k = {k:g}, KL(S||T), beta = 0", tilted(base, teachers, weight, 0), found, "sdpo", at_0))
        found = by_sdpg(base, teachers, weight, 1.0)
        checks.append(_ratio(f"k = {k:g}, KL(S||T), beta = 1", tilted(base, teachers, weight, 1), found, "sdpg", at_1))
        found = by_distillation("gkd", base, teachers, weight, divergence="kl_teacher_student")
        checks.append(_ratio(f"k = {k:g}, KL(T||S)", arithmetic.log(), found, "gkd", forward))
    ks = [1 + 0.25 * j for j in range(37)]
    lines = [Line(f"KL(S||T), beta = {beta:g}", [(k, math.log10(_odds_after(k, beta))) for k in ks], colour=colour)
             for colour, beta in enumerate((0.0, 1.0))]
    lines.append(Line("KL(T||S), and the base", [(k, math.log10(k)) for k in ks], colour=2, dashed=True))
    return Law("copying", "A teacher that copies its demonstration about squares the odds", [
        "Two right answers with base odds k, a wrong one as likely as the rarer; T(. | y') = 0.9 delta(y') + 0.1 base; "
        "demonstrations drawn as the base draws right answers. KL(S||T) multiplies the odds; the arithmetic mean of "
        "the "
        "teachers, to which KL(T||S) leads, keeps them.",
    ], checks, figures=[Figure("copying", "Odds of the likelier answer after training, log10",
                               "By the base's odds; both right answers have the same reward.", lines, "odds k")])


def _odds_after(k: float, beta: float) -> float:
    after = tilted(*copy_teachers(k, 0.1), beta)
    return float((after[0] - after[1]).exp())


def _ratio(what: str, closed: Tensor, found: Tensor, by: str, known: str) -> Check:
    a, b = (float((x[0] - x[1]).exp()) for x in (closed, found))
    return check(what, a, b, by, 1e-8 * a, known=[known])
