"""Reports on samples: several metrics, each beside the same figure for real data."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.data import densities
from diffusion.data.sources import Source
from diffusion.evaluation.classifiers import Classifier
from diffusion.evaluation.metrics.energy import energy_distance
from diffusion.evaluation.metrics.frechet import frechet_beside_real
from diffusion.evaluation.metrics.nearest import nearest
from diffusion.evaluation.metrics.recognition import recognition
from diffusion.evaluation.metrics.wasserstein import sliced_wasserstein


def evaluate_samples(
    samples: np.ndarray,
    labels: np.ndarray,
    classifier: Classifier,
    train: Source,
    held_out: Source,
    *,
    splits: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Recognition, Fréchet distances and a memorisation hint for class-conditional samples.

    Args:
      samples: [N, H, W, C] in [-1, 1] (values outside are clipped).
      labels: [N], the classes that the samples were drawn for.
      classifier: judges the samples; its features are the space of the Fréchet distances.
      train: the real examples that the generative model was trained on.
      held_out: real examples that neither model has seen.
      splits: number of random halvings of the held-out data that are averaged.
      seed: of these halvings.

    Returns:
      The JSON-ready figures of ``recognition``, of ``frechet_beside_real`` in the classifier's
      features and of ``nearest`` in pixels, beside as many held-out examples at most; num_samples,
      num_held_out and the data's note.

    Raises:
      ValueError: no samples, other shapes than the data's, labels of another length, non-finite
        values, held-out data that are contained in the training data.
    """
    samples, labels = np.asarray(samples, np.float32), np.asarray(labels)
    if len(samples) < 2 or samples.shape[1:] != held_out.shape:
        raise ValueError(
            f"expected at least two samples [N, {', '.join(map(str, held_out.shape))}], "
            f"got {samples.shape}"
        )
    if labels.shape != samples.shape[:1]:
        raise ValueError(f"expected labels [{len(samples)}], got {labels.shape}")
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).reshape(len(samples), -1).any(1).sum())
        raise ValueError(f"{bad} of {len(samples)} samples contain NaN or infinity")
    samples = samples.clip(-1, 1)

    rng = np.random.default_rng(seed)
    real = held_out.all()["x"]
    features, real_features = classifier.features(samples), classifier.features(real)
    distances = frechet_beside_real(features, real_features, splits=splits, seed=rng)
    other = real[rng.permutation(len(real))[: len(samples)]]
    return {
        **recognition(samples, labels, classifier),
        **distances,
        "frechet_features": classifier.feature_name,
        **nearest(samples, other, train.all()["x"]),
        "num_samples": len(samples),
        "num_held_out": len(real),
        "data_note": held_out.note,
    }


def evaluate_points(samples: np.ndarray, density: str, *, seed: int = 1) -> dict[str, Any]:
    """Distances of 2-D samples [N, 2] to fresh points of ``density``, beside real against real.

    ``seed`` draws 2 N fresh points and must differ from that of the training data.

    Returns:
      JSON-ready numbers: sliced_wasserstein and energy_distance between the samples and N fresh
      points; the same with the suffix _real between two sets of N fresh points.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 2 or samples.shape[1] != 2 or len(samples) < 2:
        raise ValueError(f"expected at least two samples [N, 2], got {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("samples contain NaN or infinity")
    n = len(samples)
    fresh = densities.sample(density, 2 * n, np.random.default_rng(seed))
    real, other = fresh[:n], fresh[n:]
    return {
        "sliced_wasserstein": sliced_wasserstein(samples, real),
        "sliced_wasserstein_real": sliced_wasserstein(other, real),
        "energy_distance": energy_distance(samples, real),
        "energy_distance_real": energy_distance(other, real),
        "num_samples": n,
    }
