"""The four-bump toy (arXiv 2606.26091, figure 2): how much KL to the base brings lost coverage back.

100 actions in four quarters, the first and the third rewarded; the base is four bumps. The policy is a softmax over the
weights of these bumps, or a table of all actions. The paper does not give its parameterisation, kernel width,
optimiser or measure of coverage; those here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from selftaught.report.page import Figure, Table
from selftaught.report.svg import Line
from selftaught.studies.laws.law import Check, Law, check, points
from selftaught.studies.laws.tables import RATE, token_loss

ACTIONS, QUARTER, BUMP, KERNEL = 100, 25, 6.25, 5.0
WEIGHTS = (0.255, 0.475, 0.095, 0.175)  # read off the figure, so that the base earns its reward of about 0.35
COVERED = 0.05  # a rewarded quarter is covered with more than this share of the rewarded mass
BETAS = (0.0, 0.1, 0.5, 5.0, 50.0)
RUNS, SAMPLES, UPDATES, RATE_SAMPLED = 3, 64, 1000, 0.1
Teacher = Literal["grpo", "sdsd"]

ACTION = torch.arange(ACTIONS, dtype=torch.float64)
RIGHT = (ACTION // QUARTER) % 2 == 0
LOG_BUMPS = (-0.5 * ((ACTION - torch.tensor([12.5, 37.5, 62.5, 87.5])[:, None].double()) / BUMP) ** 2).log_softmax(-1)
LOG_KERNEL = -0.5 * ((ACTION[:, None] - ACTION) / KERNEL) ** 2  # (demonstration, action)
START = torch.tensor(WEIGHTS, dtype=torch.float64).log()


def policy(logits: Tensor) -> Tensor:
    """log-probs of all actions (..., 100) from the logits of the bumps (..., 4)."""
    return torch.logsumexp(logits.log_softmax(-1)[..., None] + LOG_BUMPS, -2)


BASE = policy(START)


def reward(logp: Tensor) -> Tensor:
    return logp.exp()[..., RIGHT].sum(-1)


def rarer(logp: Tensor) -> Tensor:
    """The smaller share of the two rewarded quarters in the rewarded mass."""
    first, third = (logp.exp()[..., q * QUARTER : (q + 1) * QUARTER].sum(-1) for q in (0, 2))
    return torch.minimum(first, third) / (first + third)


def coverage(logp: Tensor) -> Tensor:
    """Of the two rewarded quarters, the share with more than COVERED of the rewarded mass: 0.5 or 1."""
    return torch.where(rarer(logp) > COVERED, 1.0, 0.5)


def mean_demonstration(logp: Tensor) -> Tensor:
    """E of a right action: with a Gaussian kernel all that the teachers' mean log-prob depends on."""
    p = logp.exp() * RIGHT
    return (p * ACTION).sum(-1) / p.sum(-1)


# --- exact ------------------------------------------------------------------------------------------------------------


def exact(teacher: Teacher, betas: Sequence[float], start: Tensor = START) -> Tensor:
    """Log-probs (len(betas), 100) where, from `start`, the expected update of the bumps' weights comes to be 0.

    In expectation GRPO climbs E[R] / std(R) - beta KL(S||base), its std a constant; self-distillation from a live
    teacher, proportional to S(y) K(y, y'), climbs -E[(y - m)^2] / (2 KERNEL^2) - beta KL(S||base), m the mean of the
    right actions, a constant too. Without a loss of the package: multiplicative updates of the weights, with m or std
    taken anew at each.
    """
    beta = torch.tensor(betas, dtype=torch.float64)[:, None]
    bumps = LOG_BUMPS.exp()
    w = start.softmax(-1).expand(len(betas), 4).clone()
    for _ in range(20000):
        p = w @ bumps
        if teacher == "grpo":
            r = reward(p.log())[:, None]
            gain = RIGHT / (r * (1 - r)).sqrt()
        else:
            gain = -0.5 * ((ACTION - mean_demonstration(p.log())[:, None]) / KERNEL) ** 2
        slope = (gain - beta * (p.log() - BASE)) @ bumps.T
        slope = slope - (w * slope).sum(-1, keepdim=True)
        new = w * (slope / (1 + beta + gain.abs().amax(-1, keepdim=True))).exp()
        new = (new / new.sum(-1, keepdim=True)).clamp(min=1e-300)
        if (new - w).abs().max() < 1e-11:
            break
        w = new
    return (w @ bumps).log()


def beta_that_covers(teacher: Teacher) -> float:
    """The smallest beta at which the exact optimum covers both rewarded quarters."""
    low, high = math.log(1e-2), math.log(1e2)
    for _ in range(3):  # a grid, made finer around the crossing
        grid = torch.linspace(low, high, 17, dtype=torch.float64)
        covered = rarer(exact(teacher, grid.exp().tolist())) > COVERED
        first = int(covered.int().argmax())
        low, high = float(grid[max(0, first - 1)]), float(grid[first])
    return math.exp(high)


# --- by the package's losses ------------------------------------------------------------------------------------------


def kernel_teacher(logp: Tensor, demonstration: Tensor) -> Tensor:
    """The live teacher: log of S(y) K(y, y'), up to its normaliser. Constant."""
    return logp.detach() + LOG_KERNEL[demonstration].to(logp.dtype)


def sampled(teacher: Teacher, seed: int, updates: int = UPDATES) -> Tensor:
    """Logits of the bumps (beta, run, 4): means over the last third of `updates` steps of SGD on SAMPLES actions each.

    The loss is GRPO's, or SDPO's with one right action of the group for each sample as its demonstration. The KL to
    the base is SDPG's penalty on the sampled actions. One group per beta and run.
    """
    generator = Generator().manual_seed(seed)
    shape = (len(BETAS), RUNS)
    beta = torch.tensor(BETAS, dtype=torch.float64)[:, None, None]
    group = torch.arange(len(BETAS) * RUNS).reshape(*shape, 1).expand(*shape, SAMPLES)
    theta, base, last = START.expand(*shape, 4).clone(), BASE.float(), updates // 3
    mean = torch.zeros_like(theta)
    for n in range(updates):
        x = theta.clone().requires_grad_()
        logp = policy(x).float()
        drawn = torch.multinomial(logp.detach().exp().reshape(-1, ACTIONS), SAMPLES, True, generator=generator)
        drawn = drawn.reshape(*shape, SAMPLES)
        rows = logp[..., None, :].expand(*shape, SAMPLES, ACTIONS)
        each = beta * token_loss("sdpg", {"student": rows, "teacher": base, "reference": base}, drawn, beta=0.0,
                                 alpha=1.0)
        if teacher == "grpo":
            each = each + token_loss("grpo", {"student": rows}, drawn, reward=RIGHT[drawn].double(), group=group)
        else:
            shown = _shown(drawn, generator)
            each = each + token_loss("sdpo", {"student": rows, "teacher": kernel_teacher(rows, shown)}, top_k=None,
                                     divergence="kl_student_teacher")
        theta = theta - RATE_SAMPLED * torch.autograd.grad(each.mean(-1).sum(), x)[0]
        if n >= updates - last:
            mean = mean + theta / last
    return mean


def _shown(drawn: Tensor, generator: Generator) -> Tensor:
    """For each sample a right one of its group, drawn uniformly; any of the group where none is right."""
    right = RIGHT[drawn].double().reshape(-1, SAMPLES)
    flat = torch.multinomial(torch.where(right.sum(-1, keepdim=True) > 0, right, 1.0), SAMPLES, True,
                             generator=generator)
    return drawn.gather(-1, flat.reshape(drawn.shape))


# --- a table of all actions -------------------------------------------------------------------------------------------


def table_path(live: bool, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Self-distillation of 100 free logits without a KL, in expectation: by its closed form, and by SDPO's loss.

    Demonstrations are drawn as the student now draws right actions (`live`), or as the base did. A natural-gradient
    step multiplies by a Gaussian: after n of them log S = log base - n RATE (y^2 - 2 y c) / (2 KERNEL^2) + const, c the
    mean of the m of these steps. Log-probs (100,) of both.
    """
    total, closed = 0.0, BASE
    for n in range(1, steps + 1):
        total += float(mean_demonstration(closed if live else BASE))
        closed = (BASE - n * RATE * (ACTION**2 - 2 * ACTION * total / n) / (2 * KERNEL**2)).log_softmax(-1)
    demonstrations = torch.arange(ACTIONS)[RIGHT]
    found = BASE
    for _ in range(steps):
        x = found.clone().requires_grad_()
        rows = x.expand(len(demonstrations), ACTIONS)
        weight = (found if live else BASE)[RIGHT].softmax(-1)
        each = token_loss("sdpo", {"student": rows, "teacher": kernel_teacher(rows, demonstrations)}, top_k=None,
                          divergence="kl_student_teacher")
        (slope,) = torch.autograd.grad((weight * each).sum(), x)
        found = (found - RATE * slope / found.exp().clamp(min=1e-300)).log_softmax(-1)
    return closed, found


# --- the law ----------------------------------------------------------------------------------------------------------


def toy(generator: Generator, updates: int = UPDATES) -> Law:
    """Rewards and coverage by teacher and by the weight of the KL to the base."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    checks = [check("reward of the base", 0.364, reward(BASE), "sum", 5e-4, known=["0.364"])]
    rows, data, curves = [], {}, []
    grid = torch.linspace(math.log(0.01), math.log(200), 25, dtype=torch.float64).exp().tolist()
    for colour, teacher in enumerate(NAMES):
        ends, theta = exact(teacher, BETAS), sampled(teacher, seed, updates)
        runs = policy(theta)
        if updates == UPDATES:
            rest = torch.stack([exact(teacher, BETAS, theta[:, run]) for run in range(RUNS)], 1)
            checks.append(check(f"{NAMES[teacher]}: reward where the update rests near each run's end, and of the run",
                                reward(rest), reward(runs), f"{BY[teacher]} and sdpg's penalty, sampled", 0.02))
        for j, beta in enumerate(BETAS):
            rows.append((f"{NAMES[teacher]}, beta {beta:g}", f"{reward(ends[j]):.3f}", _span(reward(runs[j])),
                         f"{rarer(ends[j]):.3f}", _span(rarer(runs[j])), f"{coverage(ends[j]):.1f}",
                         ", ".join(f"{c:.1f}" for c in coverage(runs[j])), PAPER[teacher].get(beta, "")))
        along = exact(teacher, grid)
        curves += [Line(f"{NAMES[teacher]}: {what}", points(torch.tensor(grid).log10(), of(along)),
                        colour=2 * colour + n)
                   for n, (what, of) in enumerate((("reward", reward), ("rarer share", rarer)))]
        data[f"{teacher}_covers_from_beta"] = beta_that_covers(teacher)
    fallen = exact("sdsd", (0.0,), torch.tensor([0.05, 0.85, 0.05, 0.05], dtype=torch.float64).log())
    checks.append(check("self-distillation begun mostly in the unrewarded bump between: reward of that bump alone",
                        reward(LOG_BUMPS[1]), reward(fallen), "the expected update", 1e-6))
    table_checks, table_lines = _tables()
    table = Table(f"Mean reward, share of the rarer rewarded quarter, and coverage (a rewarded quarter counts above "
                  f"{COVERED:.0%} of the rewarded mass). Exact: where the expected update rests, "
                  f"begun at the base. Sampled: {updates} updates on {SAMPLES} actions, {RUNS} runs, lowest to "
                  "highest, policies averaged over the last third. The last column is what the paper prints, whose "
                  "parameterisation is not given.",
                  ("", "reward, exact", "sampled", "rarer, exact", "sampled", "coverage, exact", "sampled",
                   "paper: reward / coverage"), rows)
    return Law("toy", "Four bumps: coverage returns, at a KL hundreds of times stronger", [
        "100 actions, two of four quarters rewarded. The policy is a softmax over the base's four bumps; teachers are "
        "S(y) K(y, y') with a Gaussian kernel around a right action of the student's own (arXiv 2606.26091, figure 2).",
        f"The exact optimum covers both rewarded quarters from beta = {data['grpo_covers_from_beta']:.3g} on for GRPO "
        f"and from {data['sdsd_covers_from_beta']:.3g} on for self-distillation. So the paper's sentence that no KL to "
        "the base undoes the collapse holds for the levels it tried, and not beyond, where little reward is left.",
        "Sampling adds two things. Under GRPO noise alone can lose the rarer quarter that the exact optimum keeps. And "
        "self-distillation has a second resting place, the unrewarded bump between the rewarded ones, into which a "
        "run may fall; its small reward then comes from that bump's two tails, which makes coverage look whole.",
        "With a free logit for each action the mean of log-kernels peaks at the mean demonstration. If that lies in an "
        "unrewarded quarter, as with demonstrations drawn from the base, so does the whole policy; demonstrations that "
        "follow the student pull it into a rewarded quarter instead.",
    ], [*checks, *table_checks], [table], [
        Figure("toy", "Reward and coverage by the weight of the KL to the base", "Exact optima of the bumps' weights.",
               curves, "log10 beta", (0.0, 1.0)),
        Figure("toy_policies", "Policies over the 100 actions",
               "Free logits, 60 natural-gradient steps, no KL; rewarded are actions 0 to 24 and 50 to 74.",
               table_lines, "action", None, True)], data)


def _span(values: Tensor) -> str:
    return f"{values.min():.3f} to {values.max():.3f}"


NAMES: dict[Teacher, str] = {"grpo": "GRPO", "sdsd": "self-distillation"}
BY = {"grpo": "grpo", "sdsd": "sdpo"}
PAPER = {"grpo": {0.0: ".976 / .50", 0.1: ".970 / 1.00", 0.5: ".877 / 1.00"},
         "sdsd": {0.0: ".990 / .50", 0.1: ".977 / .50", 0.5: ".899 / .50"}}


def _tables() -> tuple[list[Check], list[Line]]:
    checks, lines = [], [Line("base", points(ACTION, BASE.exp()), colour=7),
                         Line("raised where rewarded", points(ACTION, 0.06 * RIGHT), colour=2, dashed=True)]
    for colour, (live, whose) in enumerate(((False, "the base's"), (True, "the student's"))):
        closed, found = table_path(live)
        checks.append(check(f"free logits, {whose} demonstrations: the policy after 60 steps", closed.exp(),
                            found.exp(), "sdpo", 1e-9))
        checks.append(check("its reward", reward(closed), reward(found), "sdpo", 1e-9))
        lines.append(Line(f"free logits, {whose} demonstrations", points(ACTION, found.exp()), colour=colour))
    return checks, lines
