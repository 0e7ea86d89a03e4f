"""CMMD (Jayasumana et al., 2024): mean discrepancy of unit features with a Gaussian kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.evaluation.intervals import of_mean
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.neighbours import COLUMNS, ROWS
from diffusion.evaluation.networks.network import Network

SIGMA, SCALE = 10.0, 1000.0  # the paper's


def cmmd(a: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray]:
    """1000 (mean k(a, a') + mean k(b, b') - 2 mean k(a, b)) of a [N, D] and b [M, D].

    k(x, y) = exp(-|x - y|^2 / (2 10^2)) of features divided by their lengths. Pairs of an example
    with itself count, so that it is never negative, and 0 for equal sets. Tiles are in float32, of
    k - 1, whose rounding is a hundred times smaller than that of k; sums are in float64.

    Returns:
      The figure, and what each of a adds to it by first order, but for a constant [N].

    Raises:
      ValueError: a feature vector is 0, or features differ in size.
    """
    a, b = (_unit(x) for x in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features differ in size: {a.shape[1]} and {b.shape[1]}")
    within, across, real = _means(a, a), _means(a, b), _means(b, b)
    figure = SCALE * (within.mean() + real.mean() - 2 * across.mean())
    return float(figure), SCALE * 2 * (within - across)


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        raise ValueError("a feature vector is 0 and has no direction")
    return (x / length).astype(np.float32)


def _means(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of k - 1 over b, of each of a: [N]."""
    sums = np.zeros(len(a))
    for j in range(0, len(b), COLUMNS):
        target = jnp.asarray(b[j : j + COLUMNS])
        for i in range(0, len(a), ROWS):
            tile = np.asarray(_kernel(jnp.asarray(a[i : i + ROWS]), target))
            sums[i : i + ROWS] += tile.sum(1, dtype=np.float64)
    return sums / len(b)


@jax.jit
def _kernel(a: jax.Array, b: jax.Array) -> jax.Array:
    """k - 1: [N, M]."""
    return jnp.expm1((jnp.matmul(a, b.T, precision="highest") - 1) / SIGMA**2)


def metric(features: Network | None = None, reference: str = "") -> Metric:
    """``cmmd`` of all samples and real examples: cmmd_NETWORK.

    Published figures are of CLIP's ViT-L/14 at 336 pixels and 30,000 captions of COCO. "_ci" is
    of the samples' sampling error.
    """

    def measure(judged: Judged) -> dict[str, Any]:
        figure, shares = cmmd(judged.samples.array(), judged.real(reference).array())
        return {judged.name("cmmd"): figure, judged.name("cmmd_ci"): of_mean(shares)}

    return Metric(measure, network=features, references=(reference,))
