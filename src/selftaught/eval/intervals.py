"""Uncertainty over problems: percentile bootstrap, the exact sign test, and the paired permutation test.

P: problems, M: measures, D: bootstrap draws. Problems are what is resampled, because the samples of one
problem are not independent of one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 10_000
QUANTILE_DRAWS = 2_000  # a quantile needs the whole distribution of every draw
ENUMERATED = 20  # problems that differ: up to so many, all sign patterns are counted (2**20 sums: 8 MB)
PATTERNS = 10_000  # drawn where there are more
EQUAL = 1e-12  # differences below it are rounding
_CELLS = 4_000_000  # indices drawn at once: bounds the memory to some 32 MB however many problems there are


def bootstrap_draws(values_PM: Array, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """(D, M) means of `values_PM` over problems drawn with replacement, the same draw for every measure.

    NaN marks a problem that has no value for a measure; it is left out of that measure's means. A draw
    without one valued problem is NaN.
    """
    valid_PM = np.isfinite(values_PM)
    filled_PM = np.where(valid_PM, values_PM, 0.0)
    parts = []
    for times_DP in _times_drawn(values_PM.shape[0], draws, seed):
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((times_DP @ filled_PM) / (times_DP @ valid_PM))
    return np.concatenate(parts)


def _times_drawn(problems: int, draws: int, seed: int) -> Iterator[Array]:
    """How often each problem is in each draw of `problems` problems with replacement: (D, P), some draws at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // problems)
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        index = rng.integers(0, problems, size=(count, problems))
        flat = (index + np.arange(count)[:, None] * problems).ravel()
        yield np.bincount(flat, minlength=count * problems).reshape(count, problems).astype(np.float64)


def bootstrap(
    values_PM: Array, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[Array, Array, Array]:
    """(M,) means over problems and the ends of their percentile interval at `level`; NaN where nothing is valued."""
    drawn_DM = bootstrap_draws(values_PM, draws=draws, seed=seed)
    mean, low, high = (np.full(values_PM.shape[1], np.nan) for _ in range(3))
    for m in range(values_PM.shape[1]):
        valued = values_PM[np.isfinite(values_PM[:, m]), m]
        drawn = drawn_DM[np.isfinite(drawn_DM[:, m]), m]
        if valued.size:
            mean[m] = valued.mean()
            low[m], high[m] = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return mean, low, high


def bootstrap_quantiles(
    samples: Sequence[Sequence[float]], shares: Sequence[float], *, draws: int = QUANTILE_DRAWS, seed: int = 0,
    level: float = 0.95,
) -> tuple[Array, Array, Array]:
    """Quantiles over samples, every problem with the same weight, and the ends of their intervals over problems.

    `samples` holds those of each problem; none may be empty. The quantile at share q in (0, 1] is the least sample at
    which the mean over problems of their distribution functions reaches q. Returns three arrays, a number for each q.
    """
    values = np.unique(np.concatenate([np.asarray(each, dtype=np.float64) for each in samples]))
    cdf_PL = np.stack([np.searchsorted(np.sort(each), values, side="right") / len(each) for each in samples])

    def quantiles(cdf_DL: Array) -> Array:
        reached = np.stack([(cdf_DL < q - 1e-9).sum(axis=1) for q in shares], axis=1)
        return values[np.minimum(reached, len(values) - 1)]

    problems = len(samples)
    drawn = np.concatenate([quantiles(times @ cdf_PL / problems) for times in _times_drawn(problems, draws, seed)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return quantiles(cdf_PL.mean(axis=0, keepdims=True))[0], low, high


@dataclass(frozen=True)
class Permutation:
    """A p and the `patterns` of signs behind it: all that there are (`exact`), or so many drawn at random."""

    p: float
    patterns: int
    exact: bool


def permutation_test(differences_PM: Array, *, patterns: int = PATTERNS, seed: int = 0) -> list[Permutation]:
    """Two-sided paired permutation test of each measure: was it chance which of the two models a difference favours?

    The statistic is |sum of differences|; under the null hypothesis the sign of each is a fair coin (Fisher, The Design
    of Experiments, 1935). Where at most `ENUMERATED` problems differ, all 2**n patterns of signs are counted. Otherwise
    `patterns` are drawn, and p = (1 + as extreme) / (1 + patterns), which is valid and never 0 (Phipson and Smyth,
    arXiv 1603.05766). NaN marks a problem without a value; it is left out.
    """
    found: dict[int, Permutation] = {}
    many = []
    for m in range(differences_PM.shape[1]):
        differing = differences_PM[np.abs(np.nan_to_num(differences_PM[:, m])) > EQUAL, m]
        if differing.size > ENUMERATED:
            many.append(m)
        else:
            found[m] = Permutation(_all_patterns(differing), 2**differing.size, True)
    if many:
        extreme = _drawn_patterns(np.nan_to_num(differences_PM[:, many]), patterns, seed)
        for m, count in zip(many, extreme, strict=True):
            found[m] = Permutation((1 + int(count)) / (1 + patterns), patterns, False)
    return [found[m] for m in range(differences_PM.shape[1])]


def _all_patterns(differences_P: Array) -> float:
    """The share of all patterns of signs whose |sum| is at least the observed one; sums equal but for rounding count.

    A pattern and its mirror image have the same |sum|, so that the first sign can stay as it is.
    """
    sums = np.abs(differences_P[:1]) if differences_P.size else np.zeros(1)
    for difference in differences_P[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    return float((np.abs(sums) >= _least_extreme(differences_P[:, None])[0]).mean())


def _drawn_patterns(differences_PM: Array, patterns: int, seed: int) -> NDArray[np.int64]:
    """(M,) of `patterns` random patterns of signs, the same for all measures: how many are as extreme as observed."""
    rng = np.random.default_rng(seed)
    least_M = _least_extreme(differences_PM)
    problems, extreme_M = differences_PM.shape[0], np.zeros(differences_PM.shape[1], dtype=np.int64)
    rows = max(1, _CELLS // problems)
    for start in range(0, patterns, rows):
        signs_DP = rng.integers(0, 2, size=(min(rows, patterns - start), problems)) * 2.0 - 1.0
        extreme_M += (np.abs(signs_DP @ differences_PM) >= least_M).sum(axis=0)
    return extreme_M


def _least_extreme(differences_PM: Array) -> Array:
    """(M,) observed |sum of differences|, less the rounding error that sums of the same numbers can have."""
    return np.abs(differences_PM.sum(axis=0)) - EQUAL * np.maximum(1.0, np.abs(differences_PM).sum(axis=0))


def sign_test(differences_P: Array) -> float:
    """Exact two-sided sign test without ties: min(1, 2 P(X <= min(wins, losses))), X ~ Binomial(wins + losses, 1/2)."""
    wins, losses, _ = signs(differences_P)
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def signs(differences_P: Array) -> tuple[int, int, int]:
    """How many differences are above, below and at zero; rounding noise counts as zero, NaN not at all."""
    valued = differences_P[np.isfinite(differences_P)]
    wins, losses = int((valued > EQUAL).sum()), int((valued < -EQUAL).sum())
    return wins, losses, int(valued.size) - wins - losses
