"""Large pictures through an autoencoder in pieces, for less memory.

``encode`` and ``decode`` cut overlapping square tiles and blend them linearly where they overlap.
Tiles do not see each other (group norms and attention end at their borders), so the result is not
quite that of the whole picture. It is diffusers' ``enable_tiling``: tiles at the right and at the
bottom may be smaller, so that at most four shapes are compiled. Tiles are put together on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from diffusion.levels import Array
from diffusion.models.autoencoder import AutoencoderKL, Gaussian


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut.

    Attributes:
      size: of the tiles, in pixels of the picture; a multiple of the autoencoder's factor.
      overlap: share of a tile that it has in common with the next, in [0, 1).
    """

    size: int
    overlap: float = 0.25

    def check(self, net: AutoencoderKL) -> None:
        """Raises ValueError if the tiles do not fit the autoencoder."""
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}; expected a share in [0, 1)")
        net.check(self.size)
        # Picture and latents must advance alike, or tiles would not meet where they overlap.
        stride = int(self.size * (1 - self.overlap))
        if stride != net.factor * int(self.size // net.factor * (1 - self.overlap)) or not stride:
            raise ValueError(
                f"size={self.size}, overlap={self.overlap}: tiles would advance by {stride} "
                f"pixels, which is no multiple of the autoencoder's factor {net.factor}"
            )


def encode(net: AutoencoderKL, params: Any, x: Array, tiling: Tiling | None) -> Gaussian:
    """The unscaled latents' distribution of pictures [B, H, W, C] of any size.

    Without tiling, and where they are no larger than a tile, pictures are encoded whole.
    """
    if tiling is None:
        return _encode(net, params, x)
    tiling.check(net)
    net.check(x.shape[1:3])
    x = np.asarray(x)
    small = tiling.size // net.factor
    return _tiled(partial(_encode, net, params), x, tiling.size, small, tiling.overlap)


def decode(net: AutoencoderKL, params: Any, z: Array, tiling: Tiling | None) -> Array:
    """Pictures [B, H, W, C] of unscaled latents [B, h, w, c]; see ``encode``."""
    if tiling is None:
        return _decode(net, params, z)
    tiling.check(net)
    small, z = tiling.size // net.factor, np.asarray(z)
    return _tiled(partial(_decode, net, params), z, small, tiling.size, tiling.overlap)


@partial(jax.jit, static_argnums=0)
def _encode(net: AutoencoderKL, params: Any, x: Array) -> Gaussian:
    return net.apply({"params": params}, x, method="encode")


@partial(jax.jit, static_argnums=0)
def _decode(net: AutoencoderKL, params: Any, z: Array) -> jax.Array:
    return net.apply({"params": params}, z, method="decode")


def _tiled(function: Callable[[Array], Any], x: Array, size: int, out: int, overlap: float) -> Any:
    """``function`` on tiles of ``size``, whose results have size ``out``, blended."""
    height, width = x.shape[1:3]
    if max(height, width) <= size:
        return jax.tree.map(np.asarray, function(x))
    stride, blend = int(size * (1 - overlap)), int(out * overlap)
    rows = []
    above = None
    for i in range(0, height, stride):
        row = []
        for j in range(0, width, stride):
            tile = jax.tree.map(np.asarray, function(x[:, i : i + size, j : j + size]))
            if above is not None:
                tile = jax.tree.map(partial(_blend, blend, 1), above[len(row)], tile)
            if row:
                tile = jax.tree.map(partial(_blend, blend, 2), row[-1], tile)
            row.append(tile)
        above = row
        kept = [jax.tree.map(lambda a: a[:, : out - blend, : out - blend], tile) for tile in row]
        rows.append(jax.tree.map(lambda *tiles: np.concatenate(tiles, 2), *kept))
    return jax.tree.map(lambda *parts: np.concatenate(parts, 1), *rows)


def _blend(extent: int, axis: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """``after`` with its first ``extent`` pixels along the axis faded in over ``before``'s last."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return after
    before, after = np.moveaxis(before, axis, -1), np.moveaxis(after, axis, -1).copy()
    weight = (np.arange(extent) / extent).astype(after.dtype)
    after[..., :extent] *= weight
    after[..., :extent] += before[..., -extent:] * (1 - weight)
    return np.moveaxis(after, -1, axis)
