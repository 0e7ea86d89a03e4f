"""Mean and covariance of features, chunk by chunk, on the host in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D], divided by count - 1 (by 1 for one), of feature vectors."""

    count: int
    mean: np.ndarray
    cov: np.ndarray


def moments(chunks: Iterable[np.ndarray]) -> Moments:
    """The moments of features in chunks [b, ...], each flattened to [b, D].

    Chunks are combined by Chan, Golub and LeVeque (1979), so that no large sums cancel: however
    the features are cut into chunks, the result is the same to rounding.

    Raises:
      ValueError: there are none, chunks differ in size, or a value is not finite.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for chunk in chunks:
        if not len(chunk):
            continue
        x = np.asarray(chunk, np.float64).reshape(len(chunk), -1)
        if not np.isfinite(x).all():
            raise ValueError("features contain NaN or infinity")
        own = x.mean(0)
        x = x - own
        if not count:
            count, mean, scatter = len(x), own, x.T @ x
            continue
        if own.shape != mean.shape:
            raise ValueError(f"features differ in size: {len(mean)} and {len(own)}")
        total, apart = count + len(x), own - mean
        scatter += x.T @ x
        scatter += np.outer(apart, apart) * (count * len(x) / total)
        mean = mean + apart * (len(x) / total)
        count = total
    if not count:
        raise ValueError("statistics need at least one example, got none")
    return Moments(count, mean, scatter / max(count - 1, 1))
