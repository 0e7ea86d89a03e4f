"""I3D, Inception-v1 with kernels in time, for clips (Carreira and Zisserman, 2017).

Modules have the names of pytorch-i3d: ``Mixed_3b/b1a/conv3d``.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.inception import EXACT, FixedNorm

FEWEST = 9  # frames: the last pool takes two steps in time, of eight frames each
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": (3, 3, 3),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": (2, 2, 2),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of a block's branches: 1 x 1; 1 x 1 and 3 x 3; 1 x 1 and 3 x 3; pooled. Or a window of
maxima in time, rows and columns, which halves all three."""


class Unit(nn.Module):
    """A convolution with batch norm and ReLU of x [B, T, H, W, C], padded with zeros.

    As TensorFlow's "SAME": of an odd number of zeros the last side has one more.
    """

    features: int
    side: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        window, strides = (self.side,) * 3, (self.stride,) * 3
        conv = nn.Conv(
            self.features, window, strides, use_bias=False, precision=EXACT, name="conv3d"
        )
        factor, offset = FixedNorm(self.features, name="bn")()
        return nn.relu(conv(x) * factor + offset)


class Block(nn.Module):
    """Four branches of x [B, T, H, W, C], whose channels are laid side by side."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        plain, reduced, wide, reduced2, wide2, pooled = self.widths
        branches = (
            Unit(plain, name="b0")(x),
            Unit(wide, 3, name="b1b")(Unit(reduced, name="b1a")(x)),
            Unit(wide2, 3, name="b2b")(Unit(reduced2, name="b2a")(x)),
            Unit(pooled, name="b3b")(nn.max_pool(x, (3, 3, 3), padding="SAME")),
        )
        return jnp.concatenate(branches, axis=-1)


class Logits(nn.Module):
    """A convolution alone, with a bias."""

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Conv(self.classes, (1, 1, 1), precision=EXACT, name="conv3d")(x)


class I3D(nn.Module):
    """(clips [B, T, 224, 224, 3] in [-1, 1]) -> logits [B, classes], means over time, in float32.

    T is at least ``FEWEST``. The published network's last mean is over 7 x 7 places, which are all
    that 224 x 224 pixels leave; here it is over all places of other sizes as well.
    """

    classes: int = 400

    @nn.compact
    def __call__(self, x: Array) -> Array:
        spatial = partial(nn.max_pool, window_shape=(1, 3, 3), strides=(1, 2, 2), padding="SAME")
        x = Unit(64, 7, 2, name="Conv3d_1a_7x7")(x)
        x = spatial(x)
        x = Unit(64, name="Conv3d_2b_1x1")(x)
        x = Unit(192, 3, name="Conv3d_2c_3x3")(x)
        x = spatial(x)
        for name, widths in BLOCKS.items():
            pool = name.startswith("MaxPool3d")
            x = nn.max_pool(x, widths, (2, 2, 2), "SAME") if pool else Block(widths, name=name)(x)
        x = x.mean((2, 3), keepdims=True)
        x = (x[:, :-1] + x[:, 1:]) / 2  # windows of two steps in time
        return Logits(self.classes, name="logits")(x).mean((1, 2, 3))
