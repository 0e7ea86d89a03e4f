"""Fréchet distance of two sets of features, on the host in float64.

Heusel et al. (2017). ``Statistics`` add up over batches, so that no set of features is kept whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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
        """Statistics of both sets together (Chan et al., 1979)."""
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
    """``frechet_from_statistics`` of two sets of features [N, ...] and [M, ...].

    It is biased upwards for small sets: compare only figures obtained with the same N and M.
    """
    return frechet_from_statistics(statistics(a), statistics(b))


def frechet_beside_real(
    features: np.ndarray, real: np.ndarray, *, splits: int = 10, seed: int | np.random.Generator = 0
) -> dict[str, float | int]:
    """Fréchet distance of features [N, ...] to real ones [M, ...], beside real against real.

    Returns:
      frechet: between all features and all real ones.
      frechet_real_halves: between two disjoint halves of the real ones, and
      frechet_half: between as many features and one such half. These two are comparable: both sets
        have frechet_half_size members, and each figure is the mean over ``splits`` halvings.
    """
    rng = np.random.default_rng(seed)
    half = min(len(real) // 2, len(features))
    to_half, between_halves = [], []
    for _ in range(splits):
        order = rng.permutation(len(real))
        a, b = real[order[:half]], real[order[half : 2 * half]]
        chosen = features[rng.permutation(len(features))[:half]]
        to_half.append(frechet_distance(chosen, a))
        between_halves.append(frechet_distance(a, b))
    return {
        "frechet": frechet_distance(features, real),
        "frechet_half": float(np.mean(to_half)),
        "frechet_real_halves": float(np.mean(between_halves)),
        "frechet_half_size": half,
    }
