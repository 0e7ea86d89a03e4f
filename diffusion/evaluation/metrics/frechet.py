"""Distances between two sets of examples, computed on the host in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist


class Statistics(NamedTuple):
    """Mean and covariance of n feature vectors.

    Attributes:
      mean: [D].
      cov: [D, D], divided by n - 1 (by 1 for n = 1).
      n: number of vectors.
    """

    mean: np.ndarray
    cov: np.ndarray
    n: int

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets together (Chan et al., 1979), for features that come in parts."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.cov * max(self.n - 1, 0) + other.cov * max(other.n - 1, 0)
        scatter = scatter + np.outer(delta, delta) * (self.n * other.n / n)
        return Statistics(self.mean + delta * (other.n / n), scatter / max(n - 1, 1), n)


def statistics(features: np.ndarray) -> Statistics:
    """Mean and covariance of features [N, ...], flattened to [N, D]."""
    if len(features) == 0:
        raise ValueError("statistics need at least one example, got none")
    features = np.asarray(features, np.float64).reshape(len(features), -1)
    if not np.isfinite(features).all():
        raise ValueError("features contain NaN or infinity")
    mean = features.mean(0)
    centred = features - mean
    return Statistics(mean, centred.T @ centred / max(len(features) - 1, 1), len(features))


def frechet_from_statistics(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), at least 0.

    The squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, 1982; Heusel et al.,
    2017). Written with the symmetric square root, whose eigenvalues are real and not negative,
    it needs no correction for singular covariances or imaginary parts.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features differ in size: {a.mean.shape[0]} and {b.mean.shape[0]}")
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.cov @ root)
    trace = np.trace(a.cov) + np.trace(b.cov) - 2 * np.sqrt(cross.clip(0)).sum()
    return float(max(((a.mean - b.mean) ** 2).sum() + trace, 0.0))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features [N, ...] and [M, ...]; see above.

    It is biased upwards for small sets: compare only figures obtained with the same N and M.
    """
    return frechet_from_statistics(statistics(a), statistics(b))


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


def nearest_distances(a: np.ndarray, b: np.ndarray, *, chunk: int = 1024) -> np.ndarray:
    """Euclidean distance from each a [N, ...] to its nearest neighbour in b [M, ...]; [N]."""
    a, b = (np.asarray(points, np.float32).reshape(len(points), -1) for points in (a, b))
    norm = np.einsum("md,md->m", b, b)
    nearest = [
        b[np.argmin(norm - 2 * a[i : i + chunk] @ b.T, axis=1)] for i in range(0, len(a), chunk)
    ]
    return np.linalg.norm(a - np.concatenate(nearest), axis=1)
