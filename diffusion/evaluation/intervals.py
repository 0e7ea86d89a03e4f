"""95 % intervals of figures, by half their widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import stdtrit

Z95 = 1.959964  # half the width of a 95 % interval, in standard errors


def of_mean(values: np.ndarray) -> float:
    """Half the width of the interval of the mean of independent values [N]."""
    values = np.asarray(values, np.float64)
    return float(Z95 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf


def of_share(hits: np.ndarray) -> float:
    """Half the width of the interval of the mean of independent shares [N] in 0..1.

    Wilson's (1927): z / (1 + z^2 / N) sqrt(p (1 - p) / N + z^2 / (4 N^2)), which is not 0 where
    all are hits.
    """
    p, n = float(np.mean(hits)), len(hits)
    return float(Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + (Z95 / n) ** 2 / 4))


def of_neighbours(
    figures: Callable[[np.ndarray, np.ndarray], Sequence[float]],
    a: np.ndarray,
    b: np.ndarray,
    least: int,
) -> np.ndarray:
    """Half the widths of the intervals of figures of two sets, which count near neighbours.

    Neighbours share examples, so that counts are not independent; and the bootstrap's copies are
    neighbours at distance 0. Therefore by subsampling (Politis and Romano, 1994): both sets are cut
    at random into G disjoint groups, and with s^2 the variance of a figure over these, the interval
    is t s / sqrt(G), with Student's t of G - 1 degrees of freedom. It is exact where the
    variance is inversely proportional to the number of examples. s^2 is a mean over four cuts.

    Args:
      figures: of two sets of features.
      a, b: the sets [N, D] and [M, D].
      least: examples of each set in a group; G is 20 at most.

    Returns:
      One for each figure; infinite if there are too few examples for two groups.
    """
    groups = min(20, len(a) // least, len(b) // least)
    if groups < 2:
        return np.full(len(figures(a, b)), np.inf)
    rng, variances = np.random.default_rng(0), []
    for _ in range(4):
        cuts = (np.array_split(rng.permutation(len(x)), groups) for x in (a, b))
        found = [figures(a[i], b[j]) for i, j in zip(*cuts, strict=True)]
        variances.append(np.var(found, axis=0, ddof=1))
    return stdtrit(groups - 1, 0.975) * np.sqrt(np.mean(variances, axis=0) / groups)
