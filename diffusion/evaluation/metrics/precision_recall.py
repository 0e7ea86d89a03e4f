"""Precision and recall of samples by their nearest neighbours (Kynkäänniemi et al., 2019)."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.intervals import of_mean
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


def metric(features: Network | None = None, reference: str = "", neighbours: int = 3) -> Metric:
    """``precision_recall`` of all samples and of the first 10,000 real examples.

    Figures precision_NETWORK, recall_NETWORK; "_ci" counts samples and real examples as independent
    draws. They depend on the numbers of examples: compare only figures with the same ones. So
    precision_NETWORK_half and recall_NETWORK_half, of as many samples as half of the real examples
    beside that half, stand beside "_half_real", of the other half beside the same one.
    """
    check_range("neighbours", neighbours, 1, 100)

    def measure(judged: Judged) -> dict[str, Any]:
        samples, real = judged.samples.array(), judged.real(reference).array(most=MOST)
        order = np.random.default_rng(0).permutation(len(real))
        half = min(len(real) // 2, len(samples))
        one, other = real[order[:half]], real[order[half : 2 * half]]
        some = samples[np.random.default_rng(0).permutation(len(samples))[:half]]
        found = {"": (samples, real), "_half": (some, one), "_half_real": (other, one)}
        figures: dict[str, Any] = {}
        for end, sets in found.items():
            both = precision_recall(*sets, neighbours)
            for name, values in zip(("precision", "recall"), both, strict=True):
                figures[judged.name(name) + end] = float(values.mean())
                if not end:
                    figures[judged.name(f"{name}_ci")] = of_mean(values)
        return figures | {judged.name("precision") + "_half_size": half}

    return Metric(measure, network=features, references=(reference,))
