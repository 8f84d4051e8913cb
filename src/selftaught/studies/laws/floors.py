"""What distillation from privileged teachers cannot get below (arXiv 2604.03128, theorems 1 and 4, proposition 1)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor

from selftaught.report.page import Figure
from selftaught.report.svg import Line
from selftaught.studies.laws.law import Check, Law, check, points
from selftaught.studies.laws.tables import descend, distributions, entropy, kl, slope, token_loss

TIGHT = 1e-12
FORWARD, REVERSE = "kl_teacher_student", "kl_student_teacher"


def expected_loss(divergence: str, student: Tensor, teachers: Tensor, weight: Tensor) -> Tensor:
    """E_r of GKD's loss: student (C, A), teachers (C, R, A), weight (C, R); (C,)."""
    views = {"student": student[:, None].expand(teachers.shape), "teacher": teachers}
    return (weight * token_loss("gkd", views, divergence=divergence)).sum(-1)


def _total(divergence: str, teachers: Tensor, weight: Tensor, student: Tensor) -> Tensor:
    return expected_loss(divergence, student, teachers, weight).sum()


def information(teachers: Tensor, weight: Tensor) -> Tensor:
    """I(Y; R) = H(mean teacher) - E[H(T_r)]: (C,)."""
    return entropy(_mean(teachers, weight)) - (weight * entropy(teachers)).sum(-1)


def log_normaliser(teachers: Tensor, weight: Tensor) -> Tensor:
    """log sum_y exp(E_r log T_r(y)): (C,)."""
    return (weight[..., None] * teachers).sum(-2).logsumexp(-1)


def floors(generator: Generator) -> Law:
    """The decomposition of expected KL, its floor in both directions, and one paper's identity that is none."""
    c, r, a = 8, 4, 6
    teachers, weight = distributions(generator, c, r, a, std=1.5), distributions(generator, c, r).exp()
    student, mean = distributions(generator, c, a), _mean(teachers, weight)
    log_z = log_normaliser(teachers, weight)
    geometric = (weight[..., None] * teachers).sum(-2) - log_z[:, None]
    forward, reverse = (expected_loss(name, student, teachers, weight) for name in (FORWARD, REVERSE))
    checks = [
        check("E[KL(T_r||S)] = KL(mean T||S) + I(Y; R)", kl(mean, student) + information(teachers, weight), forward,
              "gkd", TIGHT),
        check("E[KL(S||T_r)] = KL(S||geometric mean) - log Z", kl(student, geometric) - log_z, reverse, "gkd", TIGHT),
        check("control: the first identity for KL(S||T_r)", kl(student, mean) + information(teachers, weight), reverse,
              "gkd", 1e-2, control=True)]
    for name, floor, place in ((FORWARD, information(teachers, weight), mean), (REVERSE, -log_z, geometric)):
        best = descend(partial(_total, name, teachers, weight), torch.zeros_like(mean))
        words = ("KL(T_r||S): I(Y; R), at the mean teacher" if name == FORWARD else
                 "KL(S||T_r): -log Z, at the geometric mean")
        checks += [check(f"floor of {words}", floor, expected_loss(name, best, teachers, weight), "gkd", 1e-9),
                   check("where it is reached", place.exp(), best.exp(), "gkd", 1e-9)]
    checks.append(check("control: the floor of KL(S||T_r) is I(Y; R)", information(teachers, weight),
                        expected_loss(REVERSE, best, teachers, weight), "gkd", 1e-2, control=True))
    checks += [*_spread(student, teachers, weight), _evidence(generator)]
    return Law("floors", "Leakage has a floor: what the privilege says and the student cannot know", [
        "With teachers T_r that see a privilege r, E[KL(T_r||S)] = KL(mean T||S) + I(Y; R): no student without r gets "
        "below the mutual information (arXiv 2604.03128, theorem 1). That is said of KL(T||S); of KL(S||T) the floor "
        "is "
        "-log Z at the normalised geometric mean, another number at another place.",
        "One teacher's gradient is the mean teacher's plus a deviation of mean 0. The paper gives its spread as a sum "
        "of variances; in any parameters but the logits that leaves out covariances.",
    ], checks, figures=[_figure()])


def _mean(teachers: Tensor, weight: Tensor) -> Tensor:
    return (weight.log()[..., None] + teachers).logsumexp(-2)


def _spread(student: Tensor, teachers: Tensor, weight: Tensor) -> list[Check]:
    """Proposition 1: mean and spread over r of the gradient of KL(T_r||S), in the logits and in three parameters."""
    each = slope(lambda x: token_loss("gkd", {"student": x, "teacher": teachers}, divergence=FORWARD),
                 student[:, None].expand(teachers.shape))  # (C, R, A)
    mean = _mean(teachers, weight)
    off = teachers.exp() - mean.exp()[:, None]
    covariance = torch.einsum("cr,cru,crv->cuv", weight, off, off)
    into = torch.eye(6, 3, dtype=torch.float64) + 0.5 * torch.ones(6, 3, dtype=torch.float64).tril()
    deviation = each - (weight[..., None] * each).sum(1, keepdim=True)
    in_parameters = (weight * (deviation @ into).square().sum(-1)).sum(-1)
    score = into - (student.exp() @ into)[:, None]  # grad log S(v) in the parameters: (C, A, 3)
    inner = score @ score.transpose(1, 2)
    return [check("mean of the teachers' gradients: that of the mean teacher", student.exp() - mean.exp(),
                  (weight[..., None] * each).sum(1), "gkd", TIGHT),
            check("spread of the gradient in the logits: sum of variances", covariance.diagonal(dim1=1, dim2=2).sum(-1),
                  (weight * deviation.square().sum(-1)).sum(-1), "gkd", TIGHT),
            check("spread in three parameters, with covariances", (covariance * inner).sum((1, 2)), in_parameters,
                  "gkd", TIGHT),
            check("control: without them, as proposition 1 has it",
                  (covariance.diagonal(dim1=1, dim2=2) * inner.diagonal(dim1=1, dim2=2)).sum(-1), in_parameters, "gkd",
                  1e-3, control=True)]


def _evidence(generator: Generator) -> Check:
    """Theorem 4 on a joint of a privilege and two tokens: ratios T / S multiply to P(r | y) / P(r)."""
    joint = distributions(generator, 4 * 3 * 3).reshape(4, 3, 3)  # log P(r, y1, y2)
    privilege, answer = joint.logsumexp((1, 2)), joint.logsumexp(0)
    after_first = joint.logsumexp(2)  # log P(r, y1)
    first = after_first - privilege[:, None] - answer.logsumexp(1)
    second = (joint - after_first[..., None]) - (answer - answer.logsumexp(1, keepdim=True))
    return check("log T(y) - log S(y) summed over two tokens: log P(r|y) - log P(r)",
                 joint - answer - privilege[:, None, None], first[..., None] + second, "sum over tokens", TIGHT)


def _figure() -> Figure:
    """Both floors for four equally likely privileges, each of which the teacher follows with probability 1 - eps."""
    eps = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    follow = (1 - eps)[:, None, None] * torch.eye(4, dtype=torch.float64) + eps[:, None, None] / 4
    weight = torch.full((100, 4), 0.25, dtype=torch.float64)
    return Figure("floors", "The least loss of a student that cannot see the privilege",
                  "Four privileges, four answers; "
                  "the teacher gives its own privilege's answer, and with probability eps any. Nats.",
                  [Line("KL(T_r||S): I(Y; R)", points(eps, information(follow.log(), weight)), colour=0),
                   Line("KL(S||T_r): -log Z", points(eps, -log_normaliser(follow.log(), weight)), colour=1)], "eps")
