"""Precision and recall of samples by their nearest neighbours (Kynkäänniemi et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.intervals import of_neighbours, of_share
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.neighbours import inside, radii
from diffusion.evaluation.networks.network import Network

MOST = 10_000  # real examples, as ADM has


def precision_recall(
    samples: np.ndarray, real: np.ndarray, k: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each sample lies in the real manifold [N], and each real example in theirs [M].

    A set's manifold are the closed balls around its members [., D] that reach to the k-th nearest
    other member. The means are precision and recall. With distances in float64: evaluators in
    float16 differ in the last digits.
    """
    precise = inside(samples, real, radii(real, k))[0] > 0
    recalled = inside(real, samples, radii(samples, k))[0] > 0
    return precise, recalled


def found(
    judged: Judged,
    names: Sequence[str],
    of: Callable[[np.ndarray, np.ndarray, int], Sequence[np.ndarray]],
    samples: np.ndarray,
    real: np.ndarray,
    k: int,
) -> dict[str, float]:
    """The means of what ``of`` gives of each example by k neighbours, with their intervals."""

    def means(a: np.ndarray, b: np.ndarray) -> list[float]:
        return [float(values.mean()) for values in of(a, b, k)]

    figures = {}
    each = of(samples, real, k)
    halves = of_neighbours(means, samples, real, 4 * k)
    for name, values, half in zip(names, each, halves, strict=True):
        figures[judged.name(name)] = float(values.mean())
        if np.isfinite(half):
            # Where all groups agree, some misses may still be left out by chance.
            least = of_share(values) if values.dtype == bool else 0.0
            figures[judged.name(f"{name}_ci")] = max(float(half), least)
    return figures


def metric(features: Network | None = None, reference: str = "", neighbours: int = 3) -> Metric:
    """``precision_recall`` of all samples and of the first 10,000 real examples.

    Figures precision_NETWORK, recall_NETWORK; "_ci" is of the sampling of samples and of real
    examples, where these suffice for it. They depend on the numbers of examples: compare only
    figures with the same ones. So precision_NETWORK_half and recall_NETWORK_half, of as many
    samples as half of the real examples beside that half, stand beside "_half_real", of the other
    half beside the same one; with more examples in a half than ``neighbours``.
    """
    check_range("neighbours", neighbours, 1, 100)

    def measure(judged: Judged) -> dict[str, Any]:
        samples, real = judged.samples.array(), judged.real(reference).array(most=MOST)
        order = np.random.default_rng(0).permutation(len(real))
        half = min(len(real) // 2, len(samples))
        one, other = real[order[:half]], real[order[half : 2 * half]]
        some = samples[np.random.default_rng(0).permutation(len(samples))[:half]]
        names = ("precision", "recall")
        figures: dict[str, Any] = found(judged, names, precision_recall, samples, real, neighbours)
        if half > neighbours:
            for end, sets in {"_half": (some, one), "_half_real": (other, one)}.items():
                both = precision_recall(*sets, neighbours)
                for name, values in zip(names, both, strict=True):
                    figures[judged.name(name) + end] = float(values.mean())
            figures[judged.name("precision") + "_half_size"] = half
        return figures

    return Metric(measure, network=features, references=(reference,))
