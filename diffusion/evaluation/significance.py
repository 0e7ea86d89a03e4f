"""Whether figures differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from diffusion.evaluation.intervals import Z95

LEVEL = 0.05


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """The p-value of equal means, by Welch's t-test (1947): two-sided, of unequal variances.

    ``a`` and ``b`` have two values each at least. Where neither varies, p is 1 or 0.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"Welch's test needs two values of each, got {len(a)} and {len(b)}")
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return float(a[0] == b[0])
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def by_intervals(a: float, b: float, half_a: float, half_b: float) -> float:
    """The p-value of equal means of normal variables, from half widths of their 95 % intervals.

    z = (a - b) / sqrt(s_a^2 + s_b^2) with s = half / 1.96, two-sided.
    """
    error = math.hypot(half_a, half_b) / Z95
    if error == 0:
        return float(a == b)
    return math.erfc(abs(a - b) / error / math.sqrt(2))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, by Holm (1979).

    Of sorted p_1 <= ... <= p_m, the k-th becomes the largest of (m - j + 1) p_j over j <= k, at
    most 1. Rejecting those below 5 % rejects a true hypothesis in 5 % of cases at most.
    """
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p)[order]), 1)
    return corrected.tolist()
