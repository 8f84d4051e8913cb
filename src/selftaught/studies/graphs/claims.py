"""What arXiv 2606.26091 claims, as differences of two arms on one test set, with intervals over its problems.

A claim is judged seed by seed: it holds where the whole 95 % interval is on its side, it is reversed where the whole
interval is on the other, and otherwise the seed does not decide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selftaught.eval.measures import is_right, pass_at_k
from selftaught.eval.tables import Table, differences, means
from selftaught.studies.graphs.measures import by_problem, concepts, effective, ladder

NEAR = 0.03  # pass@1 within which two arms count as equal
LONGEST = "longest"  # of the larger sets
NAMES = ("pass@1", "rise", "effective", "solved", "concepts", "concepts_all")
Tables = Mapping[str, Mapping[str, Mapping[str, Table]]]  # by arm, seed and set


@dataclass(frozen=True)
class Side:
    """A measure of one arm on one set."""

    arm: str
    measure: str
    test: str = "in"


@dataclass(frozen=True)
class Claim:
    """That `more` is above `less`, or below it by less than `margin`."""

    text: str
    more: Side
    less: Side
    margin: float = 0.0


CLAIMS: tuple[Claim, ...] = (
    Claim("SDSD uses fewer concepts than GRPO: effective ones of right samples", Side("grpo", "effective"),
          Side("sdsd", "effective")),
    Claim("... unique ones of right samples", Side("grpo", "concepts"), Side("sdsd", "concepts")),
    Claim("... unique ones of all samples, as the paper seems to count", Side("grpo", "concepts_all"),
          Side("sdsd", "concepts_all")),
    Claim(f"SDSD's pass@1 is not below GRPO's by {NEAR}", Side("sdsd", "pass@1"), Side("grpo", "pass@1"), NEAR),
    Claim("SDSD's pass@1 on the larger graphs is above GRPO's", Side("sdsd", "pass@1", LONGEST),
          Side("grpo", "pass@1", LONGEST)),
    Claim("SDSD's pass@k is flatter than GRPO's on the larger graphs", Side("grpo", "rise", LONGEST),
          Side("sdsd", "rise", LONGEST)),
    Claim("SDSD solves fewer of the harder graphs than GRPO, with all samples", Side("grpo", "solved", "harder"),
          Side("sdsd", "solved", "harder")),
    Claim("SDSD solves more where the cut is random: it fails by what it prefers",
          Side("sdsd", "solved", "harder-random"), Side("sdsd", "solved", "harder")),
    Claim("GRPO + diversity uses more concepts than GRPO", Side("grpo-diversity", "effective"),
          Side("grpo", "effective")),
    Claim("GRPO + diversity is worse than GRPO on the larger graphs (pass@1)", Side("grpo", "pass@1", LONGEST),
          Side("grpo-diversity", "pass@1", LONGEST)),
)  # fmt: skip
FIXES = ("grpo-diversity", "sdsd-mixture", "sdsd-average", "sdsd-different", "sdsd-forward", "sdsd-nearest", "sdpo",
         "rlsd", "sdpg", "demopsd")


def fixes() -> Iterator[Claim]:
    """Of every arm that might keep what SDSD loses: does it, and at what price?"""
    for arm in FIXES:
        yield Claim(f"{arm} uses more concepts than SDSD", Side(arm, "effective"), Side("sdsd", "effective"))
        yield Claim(f"{arm}: pass@1 not below SDSD's by {NEAR}", Side(arm, "pass@1"), Side("sdsd", "pass@1"), NEAR)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """By problem: pass@1, pass@K - pass@1 for the largest K, effective concepts of right samples, solved by any, unique
    concepts of right samples and of all.
    """
    groups = by_problem(rows)
    most = max(ladder(min(map(len, groups))))
    values = []
    for group in groups:
        right = [row for row in group if is_right(row, 1.0)]
        share = len(right) / len(group)
        values.append((share, pass_at_k(len(group), len(right), most) - share,
                       effective([row["strategy"] for row in right]) if right else math.nan, float(bool(right)),
                       concepts(group, right=True) if right else math.nan, concepts(group, right=False)))
    return [group[0]["problem"] for group in groups], list(NAMES), np.array(values)


def difference(more: Table, less: Table, measure: str) -> dict[str, float] | None:
    """more - less with its 95 % interval: paired on problems, or of two sets of problems; None where neither has it.

    Of two sets, the ends of both intervals are combined as Zou and Donner do (doi 10.1002/sim.3095).
    """
    paired = differences(less, more).get(measure)
    if paired is None:
        a, b = means(more)[measure], means(less)[measure]
        if a["value"] is None or b["value"] is None:
            return None
        value = a["value"] - b["value"]
        paired = {"value": value, "low": value - math.hypot(a["value"] - a["low"], b["high"] - b["value"]),
                  "high": value + math.hypot(a["high"] - a["value"], b["value"] - b["low"])}
    return None if paired["value"] is None else {name: paired[name] for name in ("value", "low", "high")}


def judged(claim: Claim, tables: Tables, longest: str) -> list[dict[str, float] | None]:
    """The difference of every seed that both arms have been tested in; None: no problem has both sides."""
    found = []
    for seed in sorted({*tables.get(claim.more.arm, {})} & {*tables.get(claim.less.arm, {})}):
        more, less = (tables[side.arm][seed].get(longest if side.test == LONGEST else side.test)
                      for side in (claim.more, claim.less))  # fmt: skip
        if more is not None and less is not None:
            found.append(difference(more, less, claim.more.measure))
    return found


def lines(claims: Sequence[Claim], tables: Tables, longest: str) -> Iterator[str]:
    """Markdown: each claim with its mean difference over seeds, its range, and how many seeds decide it which way."""
    yield "| claim | difference [lowest, highest seed] | seeds: holds | reversed | undecided |"
    yield "| --- " * 5 + "|"
    for claim in claims:
        found = judged(claim, tables, longest)
        known = [one for one in found if one is not None]
        values = [one["value"] for one in known]
        spread = "no problem has both"
        if values:
            spread = f"{statistics.fmean(values):+.3f} [{min(values):+.3f}, {max(values):+.3f}]"
        holds = sum(one["low"] > -claim.margin for one in known)
        turned = sum(one["high"] < -claim.margin for one in known)
        if found:
            yield f"| {claim.text} | {spread} | {holds} | {turned} | {len(found) - holds - turned} |"
