"""How sure a figure is, at 95 %: bootstrap over documents for means, Student's t over a few seeds,
Wilson's score for shares.

Bootstrap: Efron 1979, percentile intervals, seeded. Student 1908. Score interval: Wilson 1927.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Difference", "Interval", "bootstrap", "student", "wilson"]

RESAMPLES = 2000
RESAMPLES_AT_ONCE = 50
NORMAL_QUANTILE_975 = 1.959963984540054
STUDENT_QUANTILES_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """After minus before on the same rows; row by row, so what is hard for both cancels."""

    mean: float
    interval: Interval | None
    rows: int

    def to_dict(self) -> dict[str, Any]:
        return {"difference": self.mean, "interval_95": self.interval, "rows": self.rows}


def bootstrap(
    sums: Sequence[float], counts: Sequence[float] | None = None, *, seed: int = 0
) -> Interval | None:
    """Interval of Σ sums / Σ counts when documents are drawn again with replacement.

    Counts may be any weights; draws in which they do not come to more than 0 are left out.
    None for fewer than two documents. The same seed draws the same documents.
    """
    if len(sums) < 2:
        return None
    tops = np.asarray(sums, dtype=np.float64)
    bottoms = np.ones_like(tops) if counts is None else np.asarray(counts, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means: list[float] = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = rng.integers(len(tops), size=(RESAMPLES_AT_ONCE, len(tops)))
        sum_drawn, count_drawn = tops[drawn].sum(1), bottoms[drawn].sum(1)
        # Rows may hold no trained token; a draw of such rows alone has no mean.
        means += (sum_drawn[count_drawn > 0] / count_drawn[count_drawn > 0]).tolist()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def student(values: Sequence[float]) -> Interval | None:
    """Interval of the mean of independent values, such as one for each seed; None for one alone."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    reach = _student_quantile(count - 1) * math.sqrt(variance / count)
    return mean - reach, mean + reach


def _student_quantile(degrees: int) -> float:
    """0.975 quantile: tabled for few degrees of freedom, then the Cornish-Fisher expansion
    (Abramowitz & Stegun 26.7.5), right to four digits from 9 on."""
    if degrees <= len(STUDENT_QUANTILES_975):
        return STUDENT_QUANTILES_975[degrees - 1]
    z, n = NORMAL_QUANTILE_975, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def wilson(successes: int, trials: int) -> Interval:
    """Score interval of a share: holds its level for few rows and at 0 and 1, where the normal
    one collapses."""
    z = NORMAL_QUANTILE_975
    share = successes / trials
    middle = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)
