"""Measures of a whole evaluation, and of two evaluations on the same problems, each with its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from selftaught.errors import UserError
from selftaught.eval.intervals import Array, bootstrap, bootstrap_quantiles, permutation_test, sign_test, signs
from selftaught.eval.measures import best_constant, per_problem
from selftaught.eval.rows import refuse_several

Row = Mapping[str, Any]
Summary = dict[str, Any]
LENGTHS = {"length_p10": 0.1, "length_p50": 0.5, "length_p90": 0.9}


def summarise(rows: Sequence[Row], ks: Iterable[int], *, seed: int = 0, threshold: float = 1.0) -> Summary:
    """The measures of one evaluation.

    A sample is right where its saved `status` is "right": the first part of the reward says so, and a user's function
    that returns a number does from 1.0 on. Where no status is saved, it is right from the score `threshold` on.
    `pass@k`, `pass^k`, `maj@k` and `mean@k` for each k, `distinct_answers`, `length` (tokens) and `truncated` (share
    cut at the length limit) are {value, low, high}: the mean over problems and its 95 % percentile bootstrap interval
    over problems; None where the rows do not say. So are `length_p10`, `length_p50` and `length_p90`, quantiles of the
    lengths of all samples, each problem with the same weight. `best_constant` is {value, answer}, `status` counts
    samples, `problems` and `samples` are counts, `left_out` says how many problems have too few samples for a k.
    UserError: a k above every problem's number of samples, no rows, or rows of several evaluations.
    """
    ks = _checked(rows, ks)
    problems, names, values_PM = _table(rows, ks, threshold)
    _mute_votes(rows, names, values_PM)
    mean, low, high = bootstrap(values_PM, seed=seed)
    summary: Summary = {
        name: {"value": _number(mean[m]), "low": _number(low[m]), "high": _number(high[m])}
        for m, name in enumerate(names)
    }
    counted = set(problems)
    summary |= _lengths([row for row in rows if row["problem"] in counted], seed)
    summary["best_constant"] = best_constant(row for row in rows if row["problem"] in counted)
    summary["status"] = dict(Counter(str(row.get("status") or "unknown") for row in rows).most_common())
    summary["problems"] = len(problems)
    summary["samples"] = sum(row["problem"] in counted for row in rows)
    summary["left_out"] = _left_out(rows, ks, counted)
    return summary


def compare(
    before_rows: Sequence[Row], after_rows: Sequence[Row], ks: Iterable[int], *, seed: int = 0, threshold: float = 1.0
) -> Summary:
    """Paired differences, after minus before, on the problems that both evaluations have.

    Each measure is {value, low, high, p, p_permutation, patterns, exact, better, worse, same, before, after}: the mean
    difference, its 95 % bootstrap interval over problems, the p of the exact sign test, the p of the paired permutation
    test with the number of patterns of signs behind it and whether these are all that there are, on how many problems
    the measure rose, fell or stayed, and the two means. `problems` counts the pairs, `unpaired` the problems that only
    one side has.
    UserError: as `summarise`, or no problem in common.
    """
    ks = _checked(after_rows, _checked(before_rows, ks))
    before_problems, names, before_PM = _table(before_rows, ks, threshold)
    after_problems, _, after_PM = _table(after_rows, ks, threshold)
    _mute_votes(before_rows, names, before_PM)
    _mute_votes(after_rows, names, after_PM)
    place = {problem: p for p, problem in enumerate(after_problems)}
    both = [(b, place[problem]) for b, problem in enumerate(before_problems) if problem in place]
    if not both:
        raise UserError("compare: the two evaluations have no problem in common; evaluate both on the same problems")
    before_PM, after_PM = before_PM[[b for b, _ in both]], after_PM[[a for _, a in both]]
    change_PM = after_PM - before_PM
    mean, low, high = bootstrap(change_PM, seed=seed)
    permuted = permutation_test(change_PM, seed=seed)
    result: Summary = {}
    for m, name in enumerate(names):
        better, worse, same = signs(change_PM[:, m])
        paired = np.isfinite(change_PM[:, m])
        result[name] = {
            "value": _number(mean[m]),
            "low": _number(low[m]),
            "high": _number(high[m]),
            "p": sign_test(change_PM[:, m]),
            "p_permutation": permuted[m].p,
            "patterns": permuted[m].patterns,
            "exact": permuted[m].exact,
            "better": better,
            "worse": worse,
            "same": same,
            "before": _number(before_PM[paired, m].mean()) if paired.any() else None,
            "after": _number(after_PM[paired, m].mean()) if paired.any() else None,
        }
    result["problems"] = len(both)
    result["unpaired"] = len(before_problems) + len(after_problems) - 2 * len(both)
    return result


def _checked(rows: Sequence[Row], ks: Iterable[int]) -> tuple[int, ...]:
    """The ladder of k without repeats, after refusing what cannot be measured."""
    ks = tuple(dict.fromkeys(ks))
    if not rows:
        raise UserError("no completions to measure; sample some first, or give a file that holds some")
    refuse_several(rows)
    most = max(Counter(row["problem"] for row in rows).values())
    for k in ks:
        if k < 1:
            raise UserError(f"k = {k}: pass@k needs k of at least 1")
        if k > most:
            raise UserError(
                f"k = {k}, but there are only n = {most} samples of a problem; lower k or draw more samples"
            )
    return ks


def _table(rows: Sequence[Row], ks: Sequence[int], threshold: float) -> tuple[list[Any], list[str], Array]:
    """Problems in order of appearance, names of the measures, and the (P, M) table of their values."""
    by_problem: dict[Any, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    judged = {p: mine for p, mine in by_problem.items() if any(row["score"] is not None for row in mine)}
    if not judged:
        raise UserError("not one completion has a score; score them with a verifier first")
    values = [
        per_problem(sorted(mine, key=lambda row: (str(row.get("seed")), row["sample"])), ks, threshold)
        for mine in judged.values()
    ]
    return list(judged), list(values[0]), np.array([list(v.values()) for v in values], dtype=np.float64)


def _mute_votes(rows: Sequence[Row], names: Sequence[str], values_PM: Array) -> None:
    """Where no row has an answer, votes and distinct answers are unknown, not zero."""
    if all(row.get("answer") is None for row in rows):
        for m, name in enumerate(names):
            if name.startswith("maj@") or name == "distinct_answers":
                values_PM[:, m] = math.nan


def too_few(rows: Iterable[Row], ks: Iterable[int]) -> dict[int, list[tuple[Any, int]]]:
    """For each k that some problem has too few samples for: those problems, each with its number of samples."""
    n = Counter(row["problem"] for row in rows)
    short = {k: [(problem, count) for problem, count in n.items() if count < k] for k in ks}
    return {k: problems for k, problems in short.items() if problems}


def _left_out(rows: Sequence[Row], ks: Sequence[int], counted: set[Any]) -> dict[str, int]:
    short = too_few((row for row in rows if row["problem"] in counted), ks)
    return {f"pass@{k}": len(problems) for k, problems in short.items()}


def _lengths(rows: Sequence[Row], seed: int) -> Summary:
    """The quantiles of `LENGTHS`; None where no row has a length."""
    tokens: dict[Any, list[float]] = {}
    for row in rows:
        if row.get("tokens") is not None:
            tokens.setdefault(row["problem"], []).append(row["tokens"])
    if not tokens:
        return {name: {"value": None, "low": None, "high": None} for name in LENGTHS}
    found = bootstrap_quantiles(list(tokens.values()), list(LENGTHS.values()), seed=seed)
    return {
        name: {"value": float(value), "low": float(low), "high": float(high)}
        for name, value, low, high in zip(LENGTHS, *found, strict=True)
    }


def _number(value: float) -> float | None:
    """A float that JSON can hold."""
    return float(value) if math.isfinite(value) else None
