"""How good samples are, always beside the same figure for real data."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.data import densities
from diffusion.data.sources import Source
from diffusion.evaluation.classifiers import Classifier
from diffusion.evaluation.metrics.frechet import (
    energy_distance,
    frechet_distance,
    nearest_distances,
    sliced_wasserstein,
)


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
      labels: [N] the classes asked for.
      classifier: judges the samples; its features are the space of the Fréchet distances.
      train: the real examples that the generative model was trained on.
      held_out: real examples that neither model has seen.
      splits: number of random halvings of the held-out data that are averaged.
      seed: of these halvings.

    Returns:
      JSON-ready values:
        recognised, recognised_per_class: share of samples that the classifier takes for the class
          asked for, beside classifier_accuracy on held-out real data.
        frechet: between all samples and all held-out data; sizes num_samples, num_held_out.
        frechet_real_halves: between two disjoint halves of the held-out data, and
        frechet_half: between as many samples and one such half. These two are comparable, the
          distance being biased by the sizes; both sets have frechet_half_size members and each
          figure is the mean over ``splits`` halvings.
        nearest_train, nearest_train_held_out, nearest_ratio: median Euclidean pixel distance to
          the nearest training example, of samples and of as many held-out ones at most, and
          their ratio. Far below 1 hints at memorised examples.

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

    hit = classifier.predict(samples) == labels
    real = held_out.all()["x"]
    known = train.all()["x"]
    features, real_features = classifier.features(samples), classifier.features(real)
    half = min(len(real) // 2, len(samples))
    rng = np.random.default_rng(seed)
    against_half, between_halves = [], []
    for _ in range(splits):
        order = rng.permutation(len(real))
        a, b = real_features[order[:half]], real_features[order[half : 2 * half]]
        chosen = features[rng.permutation(len(samples))[:half]]
        against_half.append(frechet_distance(chosen, a))
        between_halves.append(frechet_distance(a, b))
    nearest = float(np.median(nearest_distances(samples, known)))
    other = real[rng.permutation(len(real))[: len(samples)]]
    nearest_real = float(np.median(nearest_distances(other, known)))
    if nearest_real == 0:
        raise ValueError(f"most of the held-out {held_out.name} is contained in the training data")
    return {
        "recognised": float(hit.mean()),
        "recognised_per_class": {str(c): float(hit[labels == c].mean()) for c in np.unique(labels)},
        "classifier": classifier.name,
        "classifier_accuracy": classifier.accuracy,
        "classifier_num_held_out": classifier.num_held_out,
        "frechet": frechet_distance(features, real_features),
        "frechet_features": classifier.feature_name,
        "frechet_half": float(np.mean(against_half)),
        "frechet_real_halves": float(np.mean(between_halves)),
        "frechet_half_size": half,
        "nearest_train": nearest,
        "nearest_train_held_out": nearest_real,
        "nearest_ratio": nearest / nearest_real,
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
