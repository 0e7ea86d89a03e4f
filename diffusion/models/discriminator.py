"""Discriminator of patches (Isola et al., 2017), for training autoencoders."""

from __future__ import annotations

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.layers import GroupNorm


class PatchDiscriminator(nn.Module):
    """Images [B, H, W, C] -> logits [B, h, w, 1], one per overlapping patch; real is positive.

    It has 4 x 4 convolutions: ``layers`` of stride 2, which double the channels up to 8 ``width``,
    then two of stride 1, with leaky ReLUs between them. With 3 layers a patch is 70 x 70 pixels,
    with 2 it is 34 x 34, with 1 it is 16 x 16.

    Attributes:
      width: channels of the first layer.
      layers: number of layers of stride 2.
      norm: of all layers but the first and the last: 'batch' (Isola et al.; always by the batch's
        own statistics), 'group' (in groups of 8 channels, so that an example's logits depend on it
        alone) or 'none'.
      dtype: of the computation.
    """

    width: int = 64
    layers: int = 3
    norm: Literal["batch", "group", "none"] = "batch"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f"norm={self.norm!r}; expected 'batch', 'group' or 'none'")
        if self.layers < 1 or self.width < 1 or (self.norm == "group" and self.width % 8):
            multiple = ", width a multiple of 8" if self.norm == "group" else ""
            raise ValueError(
                f"layers={self.layers}, width={self.width}; expected at least 1 each{multiple}"
            )
        super().__post_init__()

    def check(self, size: int) -> None:
        """Raises ValueError if images of this size leave no patch to judge."""
        if size // 2**self.layers < 3:
            raise ValueError(
                f"layers={self.layers}: images of size {size} are too small; they need at least "
                f"{3 * 2**self.layers} for so many layers"
            )

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(0.02)
        conv = partial(nn.Conv, kernel_size=(4, 4), padding=1, kernel_init=init, dtype=self.dtype)
        x = nn.leaky_relu(conv(self.width, strides=2, name="conv_in")(x), 0.2)
        for k in range(1, self.layers + 1):
            features = self.width * min(2**k, 8)
            strides, bias = 2 if k < self.layers else 1, self.norm != "batch"
            x = conv(features, strides=strides, use_bias=bias, name=f"convs_{k - 1}")(x)
            if self.norm == "batch":
                x = BatchNorm(self.dtype, name=f"norms_{k - 1}")(x)
            elif self.norm == "group":
                x = GroupNorm(features // 8, dtype=self.dtype, name=f"norms_{k - 1}")(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(1, name="conv_out")(x).astype(jnp.float32)


class BatchNorm(nn.Module):
    """Normalisation of each channel by the batch's own statistics, in float32."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", _around_one, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        h = x.astype(jnp.float32)
        mean, variance = h.mean((0, 1, 2)), h.var((0, 1, 2))
        return ((h - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(self.dtype)


def _around_one(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def hinge(real: Array, fake: Array) -> Array:
    """(E max(0, 1 - D(x)) + E max(0, 1 + D(y))) / 2 of the logits of real x and generated y."""
    return 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean())


def vanilla(real: Array, fake: Array) -> Array:
    """(-E log p(x) - E log(1 - p(y))) / 2, p the logistic of logits D (Goodfellow et al., 2014)."""
    return 0.5 * (nn.softplus(-real).mean() + nn.softplus(fake).mean())


CHOICES = {f.__name__: f for f in (hinge, vanilla)}
