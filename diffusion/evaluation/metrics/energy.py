"""Energy distance of two sets of points, on the host in float64."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from diffusion.evaluation.metrics.metric import Metric, of_points


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """E = 2 E|a - b| - E|a - a'| - E|b - b'| (Székely and Rizzo, 2013) of [N, D] and [M, D].

    It is 0 only for equal distributions. Without bias (pairs of a point with itself are left
    out), so that the figure for two samples of one distribution scatters around 0. O(N M).
    """
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"energy distance needs two points in each set, got {n} and {m}")
    a, b = (np.asarray(points, np.float64).reshape(len(points), -1) for points in (a, b))
    within = cdist(a, a).sum() / (n * (n - 1)) + cdist(b, b).sum() / (m * (m - 1))
    return float(2 * cdist(a, b).mean() - within)


def metric(seed: int = 1) -> Metric:
    """``energy_distance`` of points, as in ``of_points``."""
    return of_points("energy_distance", energy_distance, seed)
