"""How published evaluators resize pictures before their networks.

Each is a product with two matrices, rows x columns^T for every channel, so that one function
serves any size. They differ in the matrices, and features differ with them: figures by different
resizing may not be compared.

All take pictures [B, H, W, C], uint8 or float with values 0..255, and a side of the result or
(height, width); they give float32 [B, height, width, C] with values 0..255.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image

from diffusion.levels import Array

Size = int | tuple[int, int]
Axis = Callable[[int, int], np.ndarray]


def tf_bilinear(x: Array, size: Size) -> Array:
    """TensorFlow 1's ``resize_bilinear``, as in the graph of 2015-12-05 and in torch-fidelity.

    Pixel i of n comes from i * N / n: no half pixel, no smoothing.
    """
    return _resized(x, size, _tf_linear)


def torch_bilinear(x: Array, size: Size) -> Array:
    """PyTorch's, as in pytorch-fid and clean-fid's "legacy_pytorch".

    Pixel i of n comes from (i + 1/2) * N / n - 1/2, without smoothing.
    """
    return _resized(x, size, _linear)


def torch_bicubic(x: Array, size: Size) -> Array:
    """PyTorch's with ``antialias``, as EDM2 prepares pictures for DINOv2: not clipped."""
    return _resized(x, size, _cubic32)


def pil_bicubic(x: Array, size: Size) -> Array:
    """Pillow's of each channel in float32, clipped and not rounded: clean-fid's "clean"."""
    return jnp.clip(_resized(x, size, _cubic), 0, 255)


def pillow_bicubic(x: np.ndarray, size: Size) -> np.ndarray:
    """Pillow's own of uint8 pictures, uint8, rounded along each axis: dgm-eval's for DINOv2."""
    height, width = _sides(size)
    if x.shape[1:3] == (height, width):
        return x
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.BICUBIC)) for one in x])


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if np.ndim(size) == 0 else tuple(size)


def _resized(x: Array, size: Size, axis: Axis) -> Array:
    height, width = _sides(size)
    return _product(x, _matrix(axis, x.shape[1], height), _matrix(axis, x.shape[2], width))


@jax.jit
def _product(x: Array, rows: Array, columns: Array) -> Array:
    # Columns first, as the libraries do: sums are rounded at the same places.
    exact = lax.Precision.HIGHEST
    x = jnp.einsum("bhwc,vw->bhvc", x.astype(jnp.float32), columns, precision=exact)
    return jnp.einsum("bhvc,uh->buvc", x, rows, precision=exact)


@lru_cache(maxsize=64)
def _matrix(axis: Axis, old: int, new: int) -> np.ndarray:
    """[new, old] float32: every new pixel's weights of the old ones."""
    return axis(old, new).astype(np.float32)


def _between(source: np.ndarray, old: int) -> np.ndarray:
    """Weights of linear interpolation at float32 positions ``source`` >= 0, [len(source), old]."""
    low = np.minimum(source.astype(np.int64), old - 1)
    high, part, new = np.minimum(low + 1, old - 1), source - low.astype(np.float32), len(source)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), low), 1 - part)
    np.add.at(matrix, (np.arange(new), high), part)
    return matrix


def _tf_linear(old: int, new: int) -> np.ndarray:
    return _between(np.arange(new, dtype=np.float32) * np.float32(old / new), old)


def _linear(old: int, new: int) -> np.ndarray:
    source = (np.arange(new) + 0.5) * np.float64(np.float32(old / new)) - 0.5  # rounded once
    return _between(np.maximum(source, 0).astype(np.float32), old)


def _cubic(old: int, new: int, dtype: type = np.float64) -> np.ndarray:
    """Keys's cubic (1981) with a = -1/2, stretched by N / n where the picture shrinks."""
    scale = dtype(old) / dtype(new)
    wide = max(scale, dtype(1))
    pixel, centre = (
        np.arange(old, dtype=dtype),
        (np.arange(new, dtype=dtype)[:, None] + 0.5) * scale,
    )
    first, last = np.trunc(centre - 2 * wide + 0.5), np.trunc(centre + 2 * wide + 0.5)
    t = np.abs((pixel - centre + 0.5) / wide)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0)) * ((first <= pixel) & (pixel < last))
    return weights / weights.sum(1, keepdims=True)


def _cubic32(old: int, new: int) -> np.ndarray:
    """``_cubic`` from positions in float32, which PyTorch has."""
    return _cubic(old, new, np.float32)
