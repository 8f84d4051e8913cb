"""What one problem's saved samples say: pass@k, pass^k, mean@k, maj@k, distinct answers, length.

n: samples of one problem, c: how many of them are right. An answer of None is a response from which none
could be read: it takes its place among the k but casts no vote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from selftaught.records import Status

Row = Mapping[str, Any]
STATUSES = get_args(Status)


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of the n samples, drawn without return, hold a right one.

    Unbiased for the chance that k fresh samples do (Chen et al., arXiv:2107.03374, eq. 1). The counts are
    whole numbers and divided once, so the result is the correctly rounded one at any n.
    """
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def pass_hat_k(n: int, c: int, k: int) -> float:
    """C(c, k) / C(n, k): the chance that k of the n samples, drawn without return, are all right.

    Unbiased for the chance that k fresh samples are (tau-bench, arXiv 2406.12045): what somebody sees who asks k times
    and needs a right answer each time.
    """
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return math.comb(c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Expected accuracy of the majority vote among k of the n samples, over all C(n, k) choices; ties split evenly.

    Exact, by counting: not a simulation, and not the first k. The answers that win count by the share of
    their samples that are right.
    """
    assert 1 <= k <= len(answers) == len(right), (len(answers), len(right), k)
    votes = Counter(a for a in answers if a is not None)
    correct = Counter(a for a, r in zip(answers, right, strict=True) if r and a is not None)
    total = 0.0
    for answer in sorted(correct):
        others = tuple(sorted(count for a, count in votes.items() if a != answer))
        silent = len(answers) - sum(votes.values())
        total += correct[answer] / votes[answer] * _win_share(votes[answer], others, silent, k)
    return total


@lru_cache(maxsize=65536)
def _win_share(mine: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """E[1 / number of winners, where mine is one] when k of mine + sum(others) + silent samples are drawn."""
    favourable = 0.0
    for j in range(1, min(mine, k) + 1):  # j: how many of mine are drawn; no other answer may have more
        left = k - j
        most_ties = left // j
        ways = np.zeros((left + 1, most_ties + 1))  # by samples drawn from the rest, by answers that tie
        ways[:, 0] = [math.comb(silent, drawn) for drawn in range(left + 1)]
        for count in others:
            ways = _with_answer(ways, count, j)
        shares = 1.0 / np.arange(1, most_ties + 2)
        favourable += math.comb(mine, j) * float(ways[left] @ shares)
    return favourable / math.comb(mine + sum(others) + silent, k)


def _with_answer(ways: NDArray[np.float64], count: int, j: int) -> NDArray[np.float64]:
    """The table of `_win_share` after one more answer, given `count` times: at most j of it drawn, j is a tie."""
    out = np.zeros_like(ways)
    for drawn in range(min(count, j, ways.shape[0] - 1) + 1):
        times = math.comb(count, drawn)
        moved = ways[: ways.shape[0] - drawn] * times
        if drawn < j:
            out[drawn:] += moved
        else:
            out[drawn:, 1:] += moved[:, :-1]
    return out


def best_constant(rows: Iterable[Row]) -> dict[str, Any]:
    """The accuracy of saying one answer to every problem: the share of the commonest gold answer, and which it is.

    Problems without a `reference` are left out; the value is None where no problem has one.
    """
    gold = {row["problem"]: _text(row.get("reference")) for row in rows}
    counts = Counter(answer for answer in gold.values() if answer is not None)
    if not counts:
        return {"value": None, "answer": None}
    answer, count = max(counts.items(), key=lambda item: (item[1], item[0]))
    return {"value": count / sum(counts.values()), "answer": answer}


def is_right(row: Row, threshold: float) -> bool:
    """Whether a sample counts as right: its verifier's status says so, however the parts of a reward add up.

    Only a row without a status, of a file from elsewhere, is judged by its score: right from `threshold` on. One
    without a score is not right.
    """
    if row["score"] is None:
        return False
    if row.get("status") in STATUSES:
        return bool(row["status"] == "right")
    return bool(row["score"] >= threshold)


UNANSWERED = ("unparsed", "timeout", "error")


def lacks_answers(rows: Iterable[Row]) -> bool:
    """Whether one problem's rows say what was right and not what was answered.

    Where no sample got as far as an answer (unparsed, timeout, error), that there is none is known.
    """
    return (all(row.get("answer") is None for row in rows)
            and any(row.get("status") not in UNANSWERED for row in rows))


def per_problem(rows: Sequence[Row], ks: Sequence[int], threshold: float) -> dict[str, float]:
    """Every measure of one problem, by name, from its rows; NaN where it has no value.

    Each @k and ^k is the mean over all C(n, k) choices of k samples: that of the mean score is the mean of all n,
    whatever k. Which samples are right: see `is_right`.
    """
    n = len(rows)
    right = [is_right(row, threshold) for row in rows]
    answers = [_text(row.get("answer")) for row in rows]
    given = [answer for answer in answers if answer is not None]
    silent = lacks_answers(rows)
    tokens = [row["tokens"] for row in rows if row.get("tokens") is not None]
    finish = [row["finish"] for row in rows if row.get("finish") is not None]
    values: dict[str, float] = {}
    for k in ks:
        values[f"pass@{k}"] = pass_at_k(n, sum(right), k) if k <= n else math.nan
    for k in ks:
        values[f"pass^{k}"] = pass_hat_k(n, sum(right), k) if k <= n else math.nan
    for k in ks:
        values[f"maj@{k}"] = math.nan if k > n or silent else maj_at_k(answers, right, k)
    for k in ks:
        values[f"mean@{k}"] = sum(row["score"] or 0.0 for row in rows) / n if k <= n else math.nan
    values["distinct_answers"] = math.nan if silent else float(len(set(given)))
    values["length"] = sum(tokens) / len(tokens) if tokens else math.nan
    values["truncated"] = finish.count("length") / len(finish) if finish else math.nan
    return values


def _text(answer: Any) -> str | None:
    """An answer as it is compared: its text without surrounding blanks."""
    return None if answer is None else str(answer).strip()
