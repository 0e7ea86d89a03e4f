"""Density and coverage of samples by the real examples' neighbourhoods (Naeem et al., 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.metrics.precision_recall import found
from diffusion.evaluation.neighbours import inside, radii
from diffusion.evaluation.networks.network import Network


def density_coverage(
    samples: np.ndarray, real: np.ndarray, k: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's density [N], and whether each real example is covered [M].

    Around each real example is the open ball that reaches to its k-th nearest other one. A
    sample's density is the number of balls that it lies in, divided by k; a real example is
    covered if a sample lies in its ball. Of samples that are distributed as the real examples are,
    the mean density is 1, and the mean coverage of equally many about 1 - 2^-k.
    """
    own, held = inside(samples, real, radii(real, k), open_balls=True)
    return own / k, held > 0


def metric(
    features: Network | None = None,
    reference: str = "",
    neighbours: int = 5,
    most: int = 10_000,
) -> Metric:
    """Means of ``density_coverage`` of equally many samples and real examples, ``most`` at most.

    Figures density_NETWORK, coverage_NETWORK; "_ci" is of the sampling of samples and of real
    examples, where these suffice for it.
    """
    check_range("neighbours", neighbours, 1, 100)
    check_range("most", most, 2, 1_000_000)

    def measure(judged: Judged) -> dict[str, Any]:
        samples = judged.samples.array(most=most)
        real = judged.real(reference).array(most=len(samples))
        names = ("density", "coverage")
        return found(judged, names, density_coverage, samples[: len(real)], real, neighbours)

    return Metric(measure, network=features, most=most, references=(reference,))
