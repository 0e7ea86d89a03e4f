"""Layers that several backbones share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.levels import Array


class Part(nn.Module):
    """A function that makes layers, as a module: their parameters lie below this module's name."""

    function: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def sinusoidal(
    positions: Array, features: int, *, cos_first: bool = True, freq_shift: float = 0.0
) -> Array:
    """Sinusoidal embedding [B, features] (float32) of positions [B], which need not be integers.

    Frequencies are 10,000^(-i / (features/2 - freq_shift)). Stable Diffusion, ADM and DiT put
    the cosines first with freq_shift 0; DDPM the sines with freq_shift 1.
    """
    half = features // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = positions.astype(jnp.float32)[:, None] * 10_000.0 ** -exponents[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(parts if cos_first else parts[::-1], axis=-1)


class EmbeddingMLP(nn.Module):
    """Dense, SiLU, Dense: an embedding of sinusoids or of a conditioning vector.

    A second vector, if there is one, is projected and added to the first. Its projection starts at
    zero, so that a new second input does not change what a network computes.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Array, second: Array | None = None) -> Array:
        if second is not None:
            dense = partial(nn.Dense, x.shape[-1], use_bias=False, dtype=self.dtype)
            x = x + dense(kernel_init=nn.initializers.zeros, name="cond_proj")(second)
        dense = partial(nn.Dense, self.features, dtype=self.dtype, kernel_init=self.kernel_init)
        return dense(name="linear_2")(nn.silu(dense(name="linear_1")(x)))


def guidance_sinusoids(scale: Array | None, features: int) -> Array:
    """[B, features] of guidance scales s [B], embedded as 1000 (s - 1), so that s = 1, no guidance,
    is the origin (latent consistency models)."""
    if scale is None:
        raise ValueError("cond.guidance is None, but the network needs it (see guidance_width)")
    return sinusoidal(1000 * (scale - 1), features, cos_first=False, freq_shift=1.0)


class SpanEmbedding(nn.Module):
    """[B, features], added to the embedding of the time: where a two-time network aims.

    The last layer starts at zero, so that a network begins as the denoiser that it was. Frequencies
    are low, 4 and below for spans in [0, 1]: a network is differentiated along them.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, time: Array, span: Array | None) -> Array:
        """Of ``cond.span``; None is 0 for each of the times [B]."""
        span = jnp.zeros(time.shape) if span is None else span
        h = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(sinusoidal(4 * span, 64))
        zeros = nn.initializers.zeros
        dense = nn.Dense(self.features, dtype=self.dtype, kernel_init=zeros, name="linear_2")
        return dense(nn.silu(h))


def slow_alone(x: Array) -> bool:
    """Whether sums over x [1, ..., C], which gradients of norms need, are slow.

    With XLA's CPU compiler and YNNPACK they are ten to a hundred times as slow as over [2, ..., C]
    or without the axis of length 1.
    """
    return x.shape[0] == 1 and jax.default_backend() == "cpu"


class GroupNorm(nn.Module):
    """Group normalisation of x [B, ..., C] with float32 statistics (Wu & He, 2018).

    Statistics are computed per channel, then per group, and become one factor and one offset per
    channel: all arrays of x's size stay [B, N, C]. On a CPU, forward pass and gradient take half
    the time of ``nn.GroupNorm``, which reduces over [N, C / G].
    """

    groups: int = 32
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"{channels} channels cannot be split into {self.groups} groups; "
                f"{math.gcd(channels, self.groups)} would do"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        width = channels // self.groups

        def group_mean(a: Array) -> Array:  # [B, N, C] -> [B, G]
            return a.mean(1).reshape(-1, self.groups, width).mean(-1)

        h = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        mean = group_mean(h)
        variance = jnp.maximum(group_mean(h * h) - mean * mean, 0)
        factor = jnp.repeat(jax.lax.rsqrt(variance + self.eps), width, axis=1) * scale
        offset = bias - jnp.repeat(mean, width, axis=1) * factor
        if slow_alone(x) and h.shape[1] % 2 == 0:  # treat the example as a batch of two halves
            h = h.reshape(2, -1, channels)
            factor = jax.lax.optimization_barrier(jnp.ones((2, 1)) @ factor)
        return (h * factor[:, None] + offset[:, None]).reshape(x.shape).astype(self.dtype)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis, of x [..., C]."""

    def __call__(self, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1]) if slow_alone(x) else x
        return super().__call__(rows).reshape(x.shape)


class Pointwise(nn.Module):
    """1 x 1 convolution with kernel [1, 1, in, out], computed as a matrix product."""

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (1, 1, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x.astype(self.dtype) @ kernel[0, 0].astype(self.dtype) + bias.astype(self.dtype)
