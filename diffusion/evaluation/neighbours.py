"""Nearest neighbours among many features, in tiles: memory does not grow with N times M."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.errors import check_range

ROWS, COLUMNS = 1024, 8192  # of a tile of distances
MORE = 4  # candidates beyond k, among which rounding cannot hide the nearest


def nearest(a: np.ndarray, b: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of b [M, D] to each of a [N, D]: distances and indices, both [N, k].

    Euclidean, nearest first. The tiles |a|^2 + |b|^2 - 2 a.b are in float32 on features from which
    the mean of b is subtracted, and choose k + 4 candidates; their distances are then computed
    in float64 from differences, so that equal examples have the distance 0.
    """
    check_range("k", k, 1, len(b))
    a, b = (np.asarray(x, np.float32).reshape(len(x), -1) for x in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features differ in size: {a.shape[1]} and {b.shape[1]}")
    centre = b.mean(0, dtype=np.float64).astype(np.float32)
    few = min(k + MORE, len(b))
    distances, indices = np.empty((len(a), k)), np.empty((len(a), k), np.int64)
    targets = [jnp.asarray(b[j : j + COLUMNS] - centre) for j in range(0, len(b), COLUMNS)]
    for i in range(0, len(a), ROWS):
        rows = a[i : i + ROWS]
        x, found, scores = jnp.asarray(rows - centre), [], []
        for j, target in enumerate(targets):
            score, index = _candidates(x, target, min(few, len(target)))
            scores.append(np.asarray(score))
            found.append(np.asarray(index) + j * COLUMNS)
        scores, found = np.concatenate(scores, 1), np.concatenate(found, 1)
        order = np.argpartition(scores, few - 1, axis=1)[:, :few]
        found = np.take_along_axis(found, order, 1)
        exact = np.stack(
            [np.linalg.norm(rows - b[c].astype(np.float64), axis=1) for c in found.T], axis=1
        )
        best = np.lexsort((found, exact), axis=1)[:, :k]
        distances[i : i + ROWS] = np.take_along_axis(exact, best, 1)
        indices[i : i + ROWS] = np.take_along_axis(found, best, 1)
    return distances, indices


@jax.jit(static_argnums=2)
def _candidates(a: jax.Array, b: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Squared distances, less |a|^2, of the k nearest, and their indices: [N, k]."""
    product = jnp.matmul(a, b.T, precision="highest")
    score, index = jax.lax.top_k(2 * product - (b**2).sum(1)[None], k)
    return -score, index
