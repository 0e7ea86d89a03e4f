"""Fréchet distance of two sets of features (Heusel et al., 2017), on the host in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.intervals import Z95
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.moments import Moments, moments
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import Set

INCEPTION = "inception2015"
LARGE, MANY = 512, 5000  # features and real examples: above, a halving takes seconds


def frechet_from_statistics(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2), at least 0.

    The squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, 1982; Heusel et al.,
    2017). Written with the symmetric square root, whose eigenvalues are real and not negative,
    it needs no correction for singular covariances or imaginary parts.

    Raises:
      ValueError: features differ in size.
    """
    root = _root(a, b)
    return _distance(a, b, np.linalg.eigvalsh(root @ a.cov @ root))


def frechet_with_error(a: Moments, b: Moments, chunks: Iterable[np.ndarray]) -> tuple[float, float]:
    """``frechet_from_statistics``, and its standard error by the sampling of ``a``.

    The infinitesimal jackknife: the distance's derivative by the weight of example x_i,

        psi_i = 2 (x_i - mu_a).(mu_a - mu_b) + (x_i - mu_a)^T (I - T) (x_i - mu_a) + const,
        T = C_b^1/2 (C_b^1/2 C_a C_b^1/2)^-1/2 C_b^1/2,

    with the pseudo-inverse of singular matrices; the error is the standard deviation of psi,
    divided by the root of N. It leaves out the distance's bias, of order D^2 / N, and what remains
    of second order where the two distributions are the same.

    Args:
      a, b: statistics; b's are exact.
      chunks: the features [n, D] that ``a`` is of.
    """
    root = _root(a, b)
    values, vectors = np.linalg.eigh(root @ a.cov @ root)
    values = values.clip(0)
    seen = values > values[-1] * len(values) * np.finfo(float).eps
    side = root @ vectors[:, seen] / np.sqrt(np.sqrt(values[seen]))
    slope = np.eye(len(root)) - side @ side.T
    psi = []
    for chunk in chunks:
        x = np.asarray(chunk, np.float64).reshape(len(chunk), -1) - a.mean
        psi.append(2 * x @ (a.mean - b.mean) + ((x @ slope) * x).sum(1))
    psi = np.concatenate(psi)
    return _distance(a, b, values), float(psi.std(ddof=1) / np.sqrt(len(psi)))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``frechet_from_statistics`` of two sets of features [N, ...] and [M, ...].

    It is biased upwards for small sets: compare only figures obtained with the same N and M.
    """
    return frechet_from_statistics(moments([a]), moments([b]))


def frechet_beside_real(
    features: np.ndarray, real: np.ndarray, *, splits: int = 10, seed: int = 0
) -> dict[str, float | int]:
    """Fréchet distances of features [N, ...] to halves of real ones [M, ...], and between halves.

    Returns:
      half_real: between two disjoint halves of the real ones, and
      half: between as many features and one such half. These two are comparable: both sets have
        half_size members, and each figure is the mean over ``splits`` halvings.
    """
    rng = np.random.default_rng(seed)
    half = min(len(real) // 2, len(features))
    to_half, between_halves = [], []
    for _ in range(splits):
        order = rng.permutation(len(real))
        a, b = (moments([real[part]]) for part in (order[:half], order[half : 2 * half]))
        chosen = features[rng.permutation(len(features))[:half]]
        to_half.append(frechet_from_statistics(moments([chosen]), a))
        between_halves.append(frechet_from_statistics(a, b))
    return {
        "half": float(np.mean(to_half)),
        "half_real": float(np.mean(between_halves)),
        "half_size": half,
    }


def _root(a: Moments, b: Moments) -> np.ndarray:
    """C_b^1/2."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features differ in size: {a.mean.shape[0]} and {b.mean.shape[0]}")
    values, vectors = np.linalg.eigh(b.cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _distance(a: Moments, b: Moments, values: np.ndarray) -> float:
    """The distance by the eigenvalues of C_b^1/2 C_a C_b^1/2."""
    trace = np.trace(a.cov) + np.trace(b.cov) - 2 * np.sqrt(values.clip(0)).sum()
    return float(max(((a.mean - b.mean) ** 2).sum() + trace, 0.0))


def _figures(judged: Judged, figure: str, real: Set, output: str) -> dict[str, Any]:
    """The distance of all samples to real ones, with its interval, and a note if they are few."""
    own, name = judged.samples.moments(output), judged.name(figure)
    chunks = judged.samples.chunks(output)
    distance, error = frechet_with_error(own, real.moments(output), chunks)
    figures: dict[str, Any] = {name: distance, judged.name(f"{figure}_ci"): Z95 * error}
    if own.count < 2 * len(own.mean):
        figures[f"{name}_note"] = (
            f"{name} is biased upwards: {own.count:,} samples are too few for the covariance of "
            f"{len(own.mean):,} features; take {2 * len(own.mean):,} or more"
        )
    return figures


def metric(features: Network | None = None, reference: str = "", splits: int = 10) -> Metric:
    """Fréchet distance fd_NETWORK of all samples to all real examples, with fd_NETWORK_ci.

    Where the real examples' features are at hand, also ``frechet_beside_real``: fd_NETWORK_half,
    fd_NETWORK_half_real and fd_NETWORK_half_size, means over ``splits`` halvings; over one, if
    there are more than 512 features or 5,000 real examples.
    """
    check_range("splits", splits, 1, 10_000)

    def measure(judged: Judged) -> dict[str, Any]:
        real = judged.real(reference)
        figures, name = _figures(judged, "fd", real, "features"), judged.name("fd")
        if real.count > 1:
            size = len(real.moments().mean)
            turns = 1 if size > LARGE or real.count > MANY else splits
            halves = (judged.samples.array(), real.array())
            beside = frechet_beside_real(*halves, splits=turns)
            figures |= {f"{name}_{key}": value for key, value in beside.items()}
        return figures

    return Metric(measure, network=features, references=(reference,), moments=True)


def fid(reference: str = "") -> Metric:
    """FID: the distance in Inception's 2,048 features, with the number of samples beside it.

    It is biased by about 1 / N: compare only figures with the same fid_inception2015_count.
    """

    def measure(judged: Judged) -> dict[str, Any]:
        figures = _figures(judged, "fid", judged.real(reference), "features")
        return figures | {f"{judged.name('fid')}_count": judged.samples.count}

    return Metric(measure, only=INCEPTION, references=(reference,), moments=True)


def sfid(reference: str = "") -> Metric:
    """sFID (Nash et al., 2021): the distance in 2,023 of Inception's spatial features."""

    def measure(judged: Judged) -> dict[str, Any]:
        return _figures(judged, "sfid", judged.real(reference), "spatial")

    outputs, of = ("spatial",), (reference,)
    return Metric(measure, outputs, only=INCEPTION, references=of, moments=True)
