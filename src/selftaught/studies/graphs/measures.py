"""What the saved completions of a test set say: pass@k, and through which concepts the problems were solved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selftaught.eval.measures import is_right, pass_at_k
from selftaught.studies.graphs.verify import JOIN

Row = Mapping[str, Any]
LADDER = (1, 2, 4, 8, 16, 32, 64)


def by_problem(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    return list(groups.values())


def ladder(samples: int) -> list[int]:
    return [k for k in LADDER if k <= samples]


def concepts(rows: Iterable[Row], *, right: bool) -> int:
    """How many concepts the completions of one problem went through; with `right`, those that solved it."""
    chosen = [row for row in rows if not right or _right(row)]
    return len({concept for row in chosen if row["strategy"] for concept in row["strategy"].split(JOIN)})


def measure(rows: Sequence[Row]) -> dict[str, float]:
    """Means over problems of one test set.

    pass@k: unbiased. slope: of pass@k in log2 k, least squares. concepts: unique ones over the samples that are right,
    of problems that were solved; concepts_all: over all samples (arXiv 2606.26091 does not say which). effective: exp
    of the entropy of the right samples' strategies. slot0: share of slot 0 among the right samples.
    """
    groups = by_problem(rows)
    ks = ladder(min(map(len, groups)))
    counts = [(len(group), sum(map(_right, group))) for group in groups]
    found = {f"pass@{k}": statistics.fmean(pass_at_k(n, c, k) for n, c in counts) for k in ks}
    found["slope"] = slope([math.log2(k) for k in ks], [found[f"pass@{k}"] for k in ks])
    solved = [[row for row in group if _right(row)] for group, (_, c) in zip(groups, counts, strict=True) if c]
    found["concepts_all"] = statistics.fmean(concepts(group, right=False) for group in groups)
    found["solved"] = len(solved) / len(groups)
    if solved:
        found["concepts"] = statistics.fmean(concepts(group, right=True) for group in solved)
        found["effective"] = statistics.fmean(effective([row["strategy"] for row in group]) for group in solved)
        right = [row for group in solved for row in group]
        found["slot0"] = statistics.fmean(row["strategy"] == row["slots"][0] for row in right)
    return found


def effective(labels: Sequence[str]) -> float:
    """exp of the entropy of their shares: how many equally frequent labels would be as uncertain; 1 to len(set)."""
    shares = [labels.count(label) / len(labels) for label in set(labels)]
    return math.exp(-sum(share * math.log(share) for share in shares))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of y over x; 0 for a single point."""
    if len(x) < 2:
        return 0.0
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return (sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
            / sum((a - mean_x) ** 2 for a in x))


def _right(row: Row) -> bool:
    return is_right(row, 1.0)


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By measure, its mean and range over seeds that have it, and in how many that was."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run[name] for run in runs if name in run]
        found[name] = {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "n": len(values)}
    return found
