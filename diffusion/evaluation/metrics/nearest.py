"""Distance of samples from the nearest training example: a hint at memorised examples."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.data.sources import affordable
from diffusion.evaluation.metrics.metric import Data, Draw, Metric, shown


def nearest(samples: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> dict[str, float]:
    """Median distances from ``train`` of samples and of held-out examples, all [N, ...].

    Returns:
      nearest_train: of the samples.
      nearest_train_held_out: of the held-out examples.
      nearest_ratio: the first divided by the second; far below 1, it hints at memorised examples.
    """
    ours, theirs = (float(np.median(nearest_distances(x, train))) for x in (samples, held_out))
    if theirs == 0:
        raise ValueError("most of the held-out examples are contained in the training data")
    return {"nearest_train": ours, "nearest_train_held_out": theirs, "nearest_ratio": ours / theirs}


def nearest_distances(a: np.ndarray, b: np.ndarray, *, chunk: int = 1024) -> np.ndarray:
    """Euclidean distance of each a [N, ...] from its nearest neighbour in b [M, ...]; [N]."""
    a, b = (np.asarray(points, np.float32).reshape(len(points), -1) for points in (a, b))
    norm = np.einsum("md,md->m", b, b)
    nearest = [
        b[np.argmin(norm - 2 * a[i : i + chunk] @ b.T, axis=1)] for i in range(0, len(a), chunk)
    ]
    return np.linalg.norm(a - np.concatenate(nearest), axis=1)


def metric() -> Metric:
    """``nearest`` of samples, beside as many held-out examples at most."""

    def measure(pipeline: Any, params: Any, data: Data, draw: Draw) -> dict[str, Any]:
        x = draw().x.clip(-1, 1)
        real, known = (shown(pipeline, params, affordable(s).all()["x"]) for s in reversed(data))
        other = real[np.random.default_rng(0).permutation(len(real))[: len(x)]]
        return nearest(x, other, known)

    return measure
