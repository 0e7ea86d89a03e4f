"""Fréchet distance of two sets of features (Heusel et al., 2017), on the host in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.moments import Moments, moments
from diffusion.evaluation.networks.network import Network


def frechet_from_statistics(a: Moments, b: Moments) -> float:
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
    return frechet_from_statistics(moments([a]), moments([b]))


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


def metric(features: Network | None = None, reference: str = "", splits: int = 10) -> Metric:
    """Fréchet distance in the features of a network, with the names fd_NETWORK..."""
    check_range("splits", splits, 1, 10_000)

    def measure(judged: Judged) -> dict[str, Any]:
        real = judged.real(reference)
        result = frechet_beside_real(judged.samples.array(), real.array(), splits=splits)
        name = judged.name("fd")
        return {name + key.removeprefix("frechet"): value for key, value in result.items()}

    return Metric(measure, network=features, references=(reference,))
