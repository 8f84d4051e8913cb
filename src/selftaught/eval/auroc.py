"""How well a score tells one kind of thing from another: the area under the ROC curve, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Z95 = 1.959963984540054
DRAWS = 2_000


def auroc(positive: Sequence[float] | Array, negative: Sequence[float] | Array) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs (the Mann-Whitney statistic); NaN where a side is empty."""
    return _placements(positive, negative)[0]


def _placements(positive: Sequence[float] | Array, negative: Sequence[float] | Array) -> tuple[float, Array, Array]:
    """The area, and for each positive (m) and negative (n) its share of pairs in the right order."""
    x, y = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if not x.size or not y.size:
        return math.nan, x, y
    across_m, across_n = _below(x, y), 1 - _below(y, x)
    return float(across_m.mean()), across_m, across_n


def _below(values: Array, others: Array) -> Array:
    """For each value the share of `others` below it, those equal counted half."""
    ordered = np.sort(others)
    counts = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.asarray(counts / (2 * others.size), dtype=np.float64)


def delong(positive: Sequence[float], negative: Sequence[float], z: float = Z95) -> tuple[float, float, float]:
    """The area and its interval by DeLong et al. (1988), taken on the logit scale so that it stays within [0, 1].

    Where the two are perfectly separated the estimated variance is 0, which says nothing of how sure that is: then the
    open end is the exact binomial bound of min(m, n) successes in as many independent trials, which is on the safe
    side. NaN where a side is empty; (0, 1) as its interval where one has a single member and the area is inside.
    """
    area, across_m, across_n = _placements(positive, negative)
    if math.isnan(area):
        return area, math.nan, math.nan
    m, n = across_m.size, across_n.size
    if area in (0.0, 1.0):
        bound = (math.erfc(z / math.sqrt(2)) / 2) ** (1 / min(m, n))
        return (area, bound, 1.0) if area == 1.0 else (area, 0.0, 1 - bound)
    if m < 2 or n < 2:
        return area, 0.0, 1.0
    deviation = math.sqrt(across_m.var(ddof=1) / m + across_n.var(ddof=1) / n)
    logit, width = math.log(area / (1 - area)), z * deviation / (area * (1 - area))
    return area, _sigmoid(logit - width), _sigmoid(logit + width)


def paired_bootstrap(positive_P: Sequence[float], negative_P: Sequence[float], *, draws: int = DRAWS, seed: int = 0
                     ) -> tuple[float, float, float]:
    """The area and its 95 % percentile interval over problems that both sides share: entry p of each is of problem p.

    What is resampled is the problem, with both of its scores, because they are not independent of one another.
    """
    x, y = np.asarray(positive_P, np.float64), np.asarray(negative_P, np.float64)
    assert x.shape == y.shape, (x.shape, y.shape)
    if not x.size:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = rng.integers(0, x.size, x.size)
        found.append(_placements(x[chosen], y[chosen])[0])
    low, high = np.quantile(found, [0.025, 0.975])
    return _placements(x, y)[0], float(low), float(high)


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: 1 where both order alike, -1 where they order the other way round; ties are left out."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    first, second = np.sign(a[:, None] - a[None, :]), np.sign(b[:, None] - b[None, :])
    size = math.sqrt(float((first**2).sum()) * float((second**2).sum()))
    return float((first * second).sum()) / size if size else math.nan


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
