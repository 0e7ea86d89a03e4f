"""95 % intervals of figures, by half their widths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Z95 = 1.959964  # half the width of a 95 % interval, in standard errors


def of_mean(values: np.ndarray) -> float:
    """Half the width of the interval of the mean of independent values [N]."""
    values = np.asarray(values, np.float64)
    return float(Z95 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf


def of_statistic(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    draws: int = 200,
    seed: int = 0,
) -> float:
    """Half the width of the interval of a statistic of values [N], by the bootstrap (Efron, 1979).

    ``statistic`` maps [draws, N] to [draws]. Not for distances of nearest neighbours, which
    examples that are drawn twice make 0.
    """
    values = np.asarray(values)
    chosen = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    return float(Z95 * np.std(statistic(values[chosen]), ddof=1))
