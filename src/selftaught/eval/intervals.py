"""Uncertainty over problems: percentile bootstrap and the exact sign test.

P: problems, M: measures, D: bootstrap draws. Problems are what is resampled, because the samples of one
problem are not independent of one another.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 10_000
_CELLS = 4_000_000  # indices drawn at once: bounds the memory to some 32 MB however many problems there are


def bootstrap_draws(values_PM: Array, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """(D, M) means of `values_PM` over problems drawn with replacement, the same draw for every measure.

    NaN marks a problem that has no value for a measure; it is left out of that measure's means. A draw
    without one valued problem is NaN.
    """
    problems = values_PM.shape[0]
    rng = np.random.default_rng(seed)
    valid_PM = np.isfinite(values_PM)
    filled_PM = np.where(valid_PM, values_PM, 0.0)
    parts = []
    rows = max(1, _CELLS // problems)
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        index = rng.integers(0, problems, size=(count, problems))
        flat = (index + np.arange(count)[:, None] * problems).ravel()
        times_DP = np.bincount(flat, minlength=count * problems).reshape(count, problems).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((times_DP @ filled_PM) / (times_DP @ valid_PM))
    return np.concatenate(parts)


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


def sign_test(differences_P: Array) -> float:
    """Exact two-sided sign test without ties: min(1, 2 P(X <= min(wins, losses))), X ~ Binomial(wins + losses, 1/2)."""
    wins, losses, _ = signs(differences_P)
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def signs(differences_P: Array) -> tuple[int, int, int]:
    """How many differences are above, below and at zero; rounding noise counts as zero, NaN not at all."""
    valued = differences_P[np.isfinite(differences_P)]
    wins, losses = int((valued > 1e-12).sum()), int((valued < -1e-12).sum())
    return wins, losses, int(valued.size) - wins - losses
