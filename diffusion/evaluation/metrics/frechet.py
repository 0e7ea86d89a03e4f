"""Fréchet distance of two sets of features (Heusel et al., 2017), on the host in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation import classifiers
from diffusion.evaluation.metrics.metric import Data, Draw, Metric, checked


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D], divided by n - 1 (by 1 for n = 1), of n feature vectors."""

    mean: np.ndarray
    cov: np.ndarray


def statistics(features: np.ndarray) -> Statistics:
    """Mean and covariance of features [N, ...], flattened to [N, D]."""
    if len(features) == 0:
        raise ValueError("statistics need at least one example, got none")
    features = np.asarray(features, np.float64).reshape(len(features), -1)
    if not np.isfinite(features).all():
        raise ValueError("features contain NaN or infinity")
    mean = features.mean(0)
    centred = features - mean
    return Statistics(mean, centred.T @ centred / max(len(features) - 1, 1))


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
    features: np.ndarray, real: np.ndarray, *, splits: int = 10, seed: int = 0
) -> dict[str, float | int]:
    """Fréchet distance of features [N, ...] to real ones [M, ...], beside real against real.

    Returns:
      frechet: between all features and all real ones.
      frechet_half_real: between two disjoint halves of the real ones, and
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
        "frechet_half_real": float(np.mean(between_halves)),
        "frechet_half_size": half,
    }


def metric(features: str, weights: str = "", splits: int = 10) -> Metric:
    """Fréchet distance in the features of one of ``classifiers.CHOICES``.

    Figures: those of ``frechet_beside_real``; frechet_features, what the features are.
    """
    check_range("splits", splits, 1, 10_000)
    judge = classifiers.make(features, weights)

    def measure(pipeline: Any, params: Any, data: Data, draw: Draw) -> dict[str, Any]:
        x, fitted = checked(draw(), data).clip(-1, 1), judge(data.held_out)
        real = fitted.features(data.held_out.all()["x"])
        result = frechet_beside_real(fitted.features(x), real, splits=splits)
        return result | {"frechet_features": fitted.feature_name}

    return measure
