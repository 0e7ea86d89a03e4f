"""Positions of tokens on a grid: fixed sinusoids for tokens, rotations for queries and keys."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from diffusion.levels import Array


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column [height * width] of each token, in row-major order."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return rows.reshape(-1), columns.reshape(-1)


def _angles(positions: np.ndarray, count: int) -> np.ndarray:
    """positions [L] times the frequencies 10,000^(-i / count), i < count -> [L, count]."""
    return positions[:, None] * 10_000.0 ** (-np.arange(count) / count)


def sincos_2d(height: int, width: int, features: int, *, base: int | None = None) -> np.ndarray:
    """Fixed sine-cosine embedding [height * width, features] (float32) of a grid of tokens.

    The four quarters of the channels are sin(column), cos(column), sin(row), cos(row), each over
    features/4 frequencies (4 divides features), as in MAE and DiT. With ``base`` rows and columns
    run from 0 to base, whatever height and width are, as in diffusers for images of other sizes.
    """
    rows, columns = _grid(height, width)
    if base is not None:
        rows, columns = rows * base / height, columns * base / width
    rows, columns = (_angles(p, features // 4) for p in (rows, columns))
    parts = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotary_2d(height: int, width: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, each [height * width, features / 2] (float32), for ``rotate``.

    Axial rotary positions (Su et al., 2021; Heo et al., 2024): of the features/2 planes of a head
    the first half turns with the token's row, the second with its column. ``features``, a multiple
    of 4, is the width of one head.
    """
    angles = [_angles(p, features // 4) for p in _grid(height, width)]
    angles = np.concatenate(angles, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns channel pairs (i, i + D/2) of x [B, L, heads, D] by the angles of cos, sin [L, D/2].

    Inner products of turned queries and keys depend on relative positions only. The result is
    computed in float32 and has x's dtype.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]  # [L, 1, D/2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
