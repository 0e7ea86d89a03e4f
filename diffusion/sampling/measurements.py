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


def average_pool(x: Array, factor: int) -> Array:
    """Means of factor x factor pixels: [B, H, W, C] -> [B, H / factor, W / factor, C]."""
    batch, height, width, channels = x.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor must divide the picture's {height} x {width}, got {factor}")
    blocks = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return blocks.mean((2, 4))


def repeat_pixels(y: Array, factor: int) -> Array:
    """Repeats each pixel factor x factor times: ``average_pool``'s pseudo-inverse."""
    return jnp.repeat(jnp.repeat(y, factor, axis=1), factor, axis=2)


def gaussian_blur(x: Array, std: float) -> Array:
    """Convolution with a Gaussian of ``std`` > 0 pixels, cut at 3 std, with mirrored edges.

    The picture must be larger than 3 std.
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
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, pad, mode="reflect")
        size = x.shape[axis]
        x = sum(k * lax.slice_in_dim(padded, i, i + size, axis=axis) for i, k in enumerate(kernel))
    return x
