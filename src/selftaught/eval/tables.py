"""From a table of measures by problem to means with intervals, and to paired differences of two such tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from selftaught.eval.intervals import Array, bootstrap

Table = tuple[list[Any], list[str], Array]  # problems, names of measures, (P, M) values with NaN for none


def means(table: Table, seed: int = 0) -> dict[str, dict[str, Any]]:
    """{value, low, high, problems} by measure: the mean over the problems that have it, its 95 % bootstrap interval."""
    _, names, values_PM = table
    mean, low, high = bootstrap(values_PM, seed=seed)
    return {name: {"value": number(mean[m]), "low": number(low[m]), "high": number(high[m]),
                   "problems": int(np.isfinite(values_PM[:, m]).sum())} for m, name in enumerate(names)}


def differences(before: Table, after: Table, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The means of `changes`; {} where no problem is common."""
    table = changes(before, after)
    return means(table, seed) if table[0] else {}


def changes(before: Table, after: Table) -> Table:
    """After minus before, on the problems and for the measures that both have."""
    (ours, old, before_PM), (theirs, new, after_PM) = before, after
    place = {problem: p for p, problem in enumerate(theirs)}
    pairs = [(b, place[problem]) for b, problem in enumerate(ours) if problem in place]
    names = [name for name in old if name in new]
    rows_b, rows_a = [b for b, _ in pairs], [a for _, a in pairs]
    change_PM = (after_PM[rows_a][:, [new.index(name) for name in names]]
                 - before_PM[rows_b][:, [old.index(name) for name in names]])
    return [ours[b] for b in rows_b], names, change_PM


def number(value: float) -> float | None:
    """A float that JSON can hold."""
    return float(value) if math.isfinite(value) else None
