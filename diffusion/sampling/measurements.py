"""Measurements y = A(x_0) of a picture, for guidance by them.

Each is a differentiable function of x [B, H, W, C]; ``functools.partial`` fills in its options:

    measure = partial(average_pool, factor=4)
    guided = moment_matched(denoise, measure, measure(picture), noise_std=0.01)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from diffusion.levels import Array

Measure = Callable[[Array], Array]
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


def average_pool(x: Array, factor: int) -> Array:
    """Means of factor x factor pixels: [B, H, W, C] -> [B, H / factor, W / factor, C].

    Raises:
      ValueError: if factor does not divide H and W.
    """
    batch, height, width, channels = x.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor must divide the picture's {height} x {width}, got {factor}")
    blocks = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return blocks.mean((2, 4))


def repeat_pixels(y: Array, factor: int) -> Array:
    """Repeats each pixel factor x factor times: ``average_pool``'s pseudo-inverse."""
    return jnp.repeat(jnp.repeat(y, factor, axis=1), factor, axis=2)


def gaussian_blur(x: Array, std: float) -> Array:
    """Convolution with a Gaussian of ``std`` pixels, cut at 3 std, with mirrored edges.

    Raises:
      ValueError: for std <= 0, or a picture not larger than 3 std.
    """
    reach = math.ceil(3 * std) if std > 0 else 0
    if not 0 < reach < min(x.shape[1:3]):
        raise ValueError(
            f"std must be positive and 3 std less than the picture's {x.shape[1]} x {x.shape[2]}, "
            f"got {std}"
        )
    kernel = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / std) ** 2).astype(x.dtype)
    kernel = kernel / kernel.sum()
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        padded = jnp.pad(x, pad, mode="reflect")
        size = x.shape[axis]
        x = sum(k * lax.slice_in_dim(padded, i, i + size, axis=axis) for i, k in enumerate(kernel))
    return x


def masked(x: Array, mask: Array) -> Array:
    """mask x, for a mask broadcastable to x."""
    return jnp.asarray(mask, x.dtype) * x


def grayscale(x: Array) -> Array:
    """Luma 0.299 R + 0.587 G + 0.114 B: [..., 3] -> [..., 1]."""
    _check_channels(x, 3)
    return jnp.sum(x * jnp.asarray(LUMA, x.dtype), axis=-1, keepdims=True)


def spread_gray(y: Array) -> Array:
    """``grayscale``'s pseudo-inverse, [..., 1] -> [..., 3]: w y / |w|^2 for its weights w."""
    _check_channels(y, 1)
    weights = jnp.asarray(LUMA, y.dtype)
    return y * weights / jnp.sum(weights**2)


def _check_channels(x: Array, count: int) -> None:
    if x.shape[-1] != count:
        raise ValueError(f"expected {count} channel(s), got shape {x.shape}")
