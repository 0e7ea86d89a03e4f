"""T2I-Adapter (Mou et al., 2023): features of a picture for each level of a U-Net's encoder.

They do not depend on the time, so that a sampler computes them once for all of its steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.fields import check_at_least_one
from diffusion.models.layers import Pointwise


class ResidualBlock(nn.Module):
    """x + convolution(ReLU(3 x 3 convolution of x)), the second one ``kernel`` pixels wide."""

    kernel: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        h = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name="block1")(x))
        second = nn.Conv(width, (self.kernel, self.kernel), dtype=self.dtype, name="block2")
        return x + second(h)


class Stage(nn.Module):
    """Means of 2 x 2 pixels where ``halves``, a 1 x 1 convolution to ``width`` if x [B, H, W, C]
    has another, and ``blocks`` residual blocks.

    With ``bottleneck`` the blocks have a quarter of the channels and two 3 x 3 convolutions, and
    1 x 1 convolutions lead there and back.
    """

    width: int
    blocks: int
    halves: bool
    bottleneck: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.halves:  # a last odd row or column counts alone
            x = nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)
        inner, kernel = (self.width // 4, 3) if self.bottleneck else (self.width, 1)
        if self.bottleneck or x.shape[-1] != inner:
            x = Pointwise(inner, self.dtype, name="in_conv")(x)
        for j in range(self.blocks):
            x = ResidualBlock(kernel, self.dtype, name=f"resnets_{j}")(x)
        return Pointwise(self.width, self.dtype, name="out_conv")(x) if self.bottleneck else x


class T2IAdapter(nn.Module):
    """A picture's features for a U-Net, for ``control_levels`` of its call.

    Attributes:
      widths: channels of each stage, those of the U-Net's levels. A further stage is for the mid
        block.
      blocks: residual blocks of each stage.
      factor: a square of so many pixels becomes one with all their channels, at first.
      halved: whether each stage halves the resolution.
      bottleneck: whether the stages are narrow within ("light").
      hint_channels: of the picture.
      dtype: of the computation.
    """

    widths: Sequence[int] = (320, 640, 1280, 1280)
    blocks: int = 2
    factor: int = 8
    halved: Sequence[bool] = (False, True, True, True)
    bottleneck: bool = False
    hint_channels: int = 3
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        check_at_least_one(self, "blocks", "factor", "hint_channels")
        least = 4 if self.bottleneck else 1
        if not self.widths or any(width < least or width % least for width in self.widths):
            raise ValueError(f"widths={self.widths}; expected multiples of {least}, one per stage")
        if len(self.halved) != len(self.widths):
            raise ValueError(
                f"halved={self.halved} has {len(self.halved)} entries; expected "
                f"{len(self.widths)}, as many as widths={self.widths}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Array) -> tuple[Array, ...]:
        """The stages' outputs, [B, h, w, widths[i]], of a picture [B, H, W, C] in [0, 1].

        Raises:
          ValueError: H or W is no multiple of ``factor``, or C is not ``hint_channels``.
        """
        b, height, width, channels = image.shape
        if channels != self.hint_channels:
            raise ValueError(
                f"the hint has {channels} channels; expected hint_channels={self.hint_channels}"
            )
        r = self.factor
        if height % r or width % r:
            raise ValueError(f"the hint has {height} x {width} pixels; expected multiples of {r}")
        x = image.reshape(b, height // r, r, width // r, r, channels)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(b, height // r, width // r, -1)
        if not self.bottleneck:
            x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        features = []
        for i, (wide, halves) in enumerate(zip(self.widths, self.halved)):
            stage = Stage(wide, self.blocks, halves, self.bottleneck, self.dtype, name=f"body_{i}")
            x = stage(x)
            features.append(x)
        return tuple(features)


def full(widths: Sequence[int] = (320, 640, 1280, 1280), **fields: int) -> T2IAdapter:
    """The adapter of Stable Diffusion 1: 77.4 M parameters."""
    return T2IAdapter(widths=widths, halved=tuple(i > 0 for i in range(len(widths))), **fields)


def light(widths: Sequence[int] = (320, 640, 1280, 1280), **fields: int) -> T2IAdapter:
    """The small adapter of Stable Diffusion 1: 18.7 M parameters."""
    return full(widths, **{"blocks": 4, "bottleneck": True} | fields)


def full_xl(widths: Sequence[int] = (320, 640, 1280, 1280), **fields: int) -> T2IAdapter:
    """SDXL's adapter: 79.0 M parameters.

    The U-Net's first level has no attention, so that its features are those after halving.
    """
    halved = tuple(i == 2 for i in range(len(widths)))
    return T2IAdapter(widths=widths, halved=halved, **{"factor": 16} | fields)
