"""Mean and covariance of features, chunk by chunk, on the host in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

LARGEST = 20_000  # features
ROWS = 500  # of examples that are summed at once


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
      ValueError: there are none, chunks differ in size, a value is not finite, or there are more
        than 20,000 features.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for x in _gathered(chunks):
        if not np.isfinite(x).all():
            raise ValueError("features contain NaN or infinity")
        if x.shape[1] > LARGEST:
            raise ValueError(
                f"examples have {x.shape[1]:,} features, whose covariance takes "
                f"{x.shape[1] ** 2 / 2**27:.0f} GiB; expected {LARGEST:,} at most"
            )
        own = x.mean(0)
        x = x - own
        if not count:
            count, mean, scatter = len(x), own, x.T @ x
            continue
        total, apart = count + len(x), own - mean
        scatter += x.T @ x
        scatter += np.outer(apart, apart) * (count * len(x) / total)
        mean = mean + apart * (len(x) / total)
        count = total
    if not count:
        raise ValueError("statistics need at least one example, got none")
    return Moments(count, mean, scatter / max(count - 1, 1))


def _gathered(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Chunks [b, D] in float64 of at least ``ROWS`` examples, but for the last: the work of a
    product of matrices D x D hardly depends on b where b is small."""
    held: list[np.ndarray] = []
    size = 0
    for chunk in chunks:
        if not len(chunk):
            continue
        held.append(np.asarray(chunk, np.float64).reshape(len(chunk), -1))
        found = held[-1].shape[1]
        size = size or found
        if found != size:
            raise ValueError(f"features differ in size: {size} and {found}")
        if sum(map(len, held)) >= ROWS:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)
