"""Nearest neighbours among many features, in tiles: memory does not grow with N times M.

Tiles of squared distances |a|^2 + |b|^2 - 2 a.b are in float32, of features from which a common
mean is subtracted. Their error, at most about ROUNDING (|a| + |b|)^2, hides small differences. It
therefore only chooses candidates: every distance that is returned or decides is computed again in
float64 from differences, so that equal examples have the distance 0. Where the error, or numbers
beyond float32's range, could hide a neighbour, tiles are computed again in float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.errors import check_range

ROWS, COLUMNS = 1024, 8192  # of a tile of distances
MORE = 4  # candidates beyond k, among which rounding cannot hide the nearest
ROUNDING = 64 * 2.0**-24  # of float32 tiles; a third of it was seen with 2,048 features
SMALLEST = 1e-30  # squared distance that float32 can tell from 0
PAIRS = 4096  # whose distances are computed again at a time


def nearest(a: np.ndarray, b: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of b [M, D] to each of a [N, D]: distances and indices, both [N, k].

    Euclidean, nearest first. The k + 4 with the smallest lower bounds by the float32 tiles are
    candidates. They hold the k nearest for certain if the k-th of them is closer than all other
    bounds; rows where it is not are searched again by tiles in float64.

    Raises:
      ValueError: k is not in [1, M], or features differ in size.
    """
    a, b = _features(a, b)
    check_range("k", k, 1, len(b))
    distances, indices, bound = _search(a, b, k, np.float32)
    hidden = np.flatnonzero(~(distances[:, -1] ** 2 <= bound))
    if len(hidden):
        distances[hidden], indices[hidden], _ = _search(a[hidden], b, k, np.float64)
    return distances, indices


def _search(
    a: np.ndarray, b: np.ndarray, k: int, dtype: type
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``nearest`` by tiles of a type, and what squared distances of all others are not below."""
    centre = b.mean(0, dtype=np.float64).astype(dtype)
    few, candidates = min(k + MORE, len(b)), _candidates if dtype is np.float32 else _exactly
    distances, indices = np.empty((len(a), k)), np.empty((len(a), k), np.int64)
    bounds = np.zeros(len(a))
    for i in range(0, len(a), ROWS):
        rows = a[i : i + ROWS]
        x, found, scores = rows - centre, [], []
        for j in range(0, len(b), COLUMNS):
            target = b[j : j + COLUMNS] - centre
            score, index = candidates(x, target, min(few, len(target)))
            scores.append(np.asarray(score, np.float64))
            found.append(np.asarray(index) + j)
        scores, found = np.concatenate(scores, 1), np.concatenate(found, 1)
        order = np.argpartition(scores, few - 1, axis=1)[:, :few]
        found, scores = np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)
        exact = np.stack([_distance(rows, b[c]) for c in found.T], axis=1)
        best = np.lexsort((found, exact), axis=1)[:, :k]
        distances[i : i + ROWS] = np.take_along_axis(exact, best, 1)
        indices[i : i + ROWS] = np.take_along_axis(found, best, 1)
        squares = (x.astype(np.float64) ** 2).sum(1)
        bounds[i : i + ROWS] = np.inf if few == len(b) else squares + scores.max(1)
    return distances, indices, np.maximum(bounds, 0)  # nothing is below a distance of 0


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """The distance [N] of each of x [N, D] to its k-th nearest neighbour, itself left out.

    It is 0 for an example of which there are k further copies.

    Raises:
      ValueError: there are not more than k examples.
    """
    check_range("the number of neighbours", k, 1)
    if len(x) <= k:
        raise ValueError(f"{k} neighbours of each example need {k + 1} examples, got {len(x)}")
    return nearest(x, x, k + 1)[0][:, k]


def inside(
    points: np.ndarray, centres: np.ndarray, radius: np.ndarray, *, open_balls: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """In how many balls each point lies [N], and how many points each ball holds [M].

    Args:
      points, centres: features [N, D] and [M, D].
      radius: of the ball around each centre, [M].
      open_balls: whether the surface does not belong to a ball.
    """
    points, centres = _features(points, centres)
    # Copies are asked once: all their pairs with each other would have to be computed again.
    rows = np.ascontiguousarray(points).view(np.dtype((np.void, 4 * points.shape[1])))[:, 0]
    _, first, inverse, copies = np.unique(
        rows, return_index=True, return_inverse=True, return_counts=True
    )
    points = points[first]
    centre = centres.mean(0, dtype=np.float64).astype(np.float32)
    of_points, of_centres = np.zeros(len(points), np.int64), np.zeros(len(centres), np.int64)
    for j in range(0, len(centres), COLUMNS):
        b, r = centres[j : j + COLUMNS], radius[j : j + COLUMNS]
        target, squares = jnp.asarray(b - centre), jnp.asarray(np.square(r), jnp.float32)
        for i in range(0, len(points), ROWS):
            a = points[i : i + ROWS]
            held, doubtful = map(np.array, _within(jnp.asarray(a - centre), target, squares))
            row, column = np.nonzero(doubtful)
            for start in range(0, len(row), PAIRS):
                u, v = row[start : start + PAIRS], column[start : start + PAIRS]
                exact = _distance(a[u], b[v])
                held[u, v] = exact < r[v] if open_balls else exact <= r[v]
            of_points[i : i + ROWS] += held.sum(1)
            of_centres[j : j + COLUMNS] += copies[i : i + ROWS] @ held
    return of_points[inverse], of_centres


def _features(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(x, np.float32).reshape(len(x), -1) for x in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features differ in size: {a.shape[1]} and {b.shape[1]}")
    return a, b


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The distance of each pair of rows; to the last bit the same for (a, b) and (b, a)."""
    return np.linalg.norm(a.astype(np.float64) - b, axis=1)


@jax.jit(static_argnums=2)
def _candidates(a: jax.Array, b: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k smallest lower bounds of squared distances, less |a|^2, and their indices: [N, k]."""
    aa, bb = (a**2).sum(1)[:, None], (b**2).sum(1)[None]
    error = ROUNDING * (jnp.sqrt(aa) + jnp.sqrt(bb)) ** 2 + SMALLEST
    score, index = jax.lax.top_k(2 * jnp.matmul(a, b.T, precision="highest") - bb + error, k)
    return -score, index


def _exactly(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """``_candidates`` of float64, whose error is neglected."""
    scores = (b**2).sum(1)[None] - 2 * a @ b.T
    index = np.argpartition(scores, k - 1, axis=1)[:, :k]
    return np.take_along_axis(scores, index, 1), index


@jax.jit
def _within(a: jax.Array, b: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether squared distances are below ``squares`` [M], and where rounding may decide that."""
    aa, bb = (a**2).sum(1)[:, None], (b**2).sum(1)[None]
    gap = aa + bb - 2 * jnp.matmul(a, b.T, precision="highest") - squares[None]
    error = ROUNDING * ((jnp.sqrt(aa) + jnp.sqrt(bb)) ** 2 + squares[None]) + SMALLEST
    return gap < 0, ~(jnp.abs(gap) > error)  # also where numbers are too large for float32
