"""Sliced Wasserstein distance of two sets of points, on the host in float64."""

from __future__ import annotations

import numpy as np

from diffusion.evaluation.metrics.metric import Metric, of_points


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, *, slices: int = 128, seed: int = 0) -> float:
    """sqrt(mean over random directions of W2^2 of the projections) of [N, D] and [M, D].

    Rabin et al. (2011). In the units of the data; positive for finite samples of one
    distribution. On a line W2 compares quantiles, which for N = M are the sorted points.
    """
    a, b = (np.asarray(points, np.float64).reshape(len(points), -1) for points in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"points differ in dimension: {a.shape[1]} and {b.shape[1]}")
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], slices))
    directions /= np.linalg.norm(directions, axis=0)
    count = max(len(a), len(b))
    a, b = (_quantiles(p @ directions, count) for p in (a, b))
    return float(np.sqrt(((a - b) ** 2).mean()))


def _quantiles(points: np.ndarray, count: int) -> np.ndarray:
    """The (i + 1/2) / count quantiles, i = 0..count-1, of each column of points [N, S]."""
    points, last = np.sort(points, axis=0), len(points) - 1
    position = ((np.arange(count) + 0.5) * (len(points) / count) - 0.5).clip(0, last)
    below = position.astype(int)
    share = (position - below)[:, None]
    return (1 - share) * points[below] + share * points[np.minimum(below + 1, last)]


def metric(seed: int = 1) -> Metric:
    """``sliced_wasserstein`` of points, as in ``of_points``."""
    return of_points("sliced_wasserstein", sliced_wasserstein, seed)
