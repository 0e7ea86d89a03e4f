"""The parts of a U-Net: ResNet blocks, resampling, and the blocks of one resolution level.

``DownBlock``, ``MidBlock`` and ``UpBlock`` connect ResNet, attention and resampling layers, which
they make with the constructors (``functools.partial``) in their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import zeros

from diffusion.levels import Array
from diffusion.models.kernels.convolution import doubling_pays, of_doubled, three_by_three
from diffusion.models.layers import GroupNorm, Pointwise

Constructor = Callable[..., nn.Module]


def average_pool(x: Array) -> Array:
    """[B, H, W, C] -> [B, H/2, W/2, C], the mean of each 2 x 2 square."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def nearest_upsample(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], every pixel four times."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def added(x: Array, extra: Array | None) -> Array:
    """x + extra in x's dtype; x without extra.

    Raises:
      ValueError: their shapes [B, H, W, C] differ.
    """
    if extra is None:
        return x
    if extra.shape != x.shape:
        raise ValueError(f"features of shape {extra.shape} are to be added to those of {x.shape}")
    return x + extra.astype(x.dtype)


class ResnetBlock(nn.Module):
    """Norm, SiLU, 3 x 3 convolution, twice, plus a shortcut; the embedding enters in between.

    The embedding [B, E] is added before the second norm or, with ``scale_shift``, modulates its
    output as ``(1 + scale) * norm(h) + shift`` (ADM). Autoencoders have no embedding. ``resample``
    is applied to both paths (ADM's resampling blocks). The second convolution starts at zero, so
    that a new block computes its shortcut alone.
    """

    width: int
    groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    scale_shift: bool = False
    resample: Callable[[Array], Array] | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array | None, train: bool) -> Array:
        norm = partial(GroupNorm, self.groups, self.eps, self.dtype)
        conv = partial(nn.Conv, self.width, (3, 3), dtype=self.dtype)
        conv = partial(conv, conv_general_dilated=three_by_three)
        h = nn.silu(norm(name="norm1")(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(name="conv1")(h)
        scale = shift = None
        if emb is not None:
            features = 2 * self.width if self.scale_shift else self.width
            emb = nn.Dense(features, dtype=self.dtype, name="time_emb_proj")(nn.silu(emb))
            emb = emb[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(emb, 2, axis=-1)
            else:
                h = h + emb
        h = norm(name="norm2")(h)
        if scale is not None:
            h = h * (1 + scale) + shift
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = conv(kernel_init=zeros, name="conv2")(h)
        if x.shape[-1] != self.width:
            x = Pointwise(self.width, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2, padded by (1, 1) on each axis, or asymmetrically by (0, 1).

    DDPM and the autoencoders pad asymmetrically. Embedding and ``train`` are not used: the
    signature is ``ResnetBlock``'s.
    """

    asymmetric: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array | None = None, train: bool = False) -> Array:
        padding = ((0, 1), (0, 1)) if self.asymmetric else ((1, 1), (1, 1))
        conv = partial(nn.Conv, x.shape[-1], (3, 3), dtype=self.dtype, name="conv")
        return conv(strides=2, padding=padding)(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3 x 3 convolution, with the signature of ``Downsample``.

    On a CPU both are one operation (``convolution.of_doubled``), which halves their time.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        emb: Array | None = None,
        train: bool = False,
        size: tuple[int, int] | None = None,
    ) -> Array:
        """``size`` (H, W) cuts the last row or column off, where half of it was rounded up."""
        conv = partial(nn.Conv, x.shape[-1], (3, 3), dtype=self.dtype, name="conv")
        exact = size is None or size == (2 * x.shape[1], 2 * x.shape[2])
        if exact and doubling_pays(x):
            return conv(conv_general_dilated=of_doubled)(x)
        x = nearest_upsample(x)
        x = x if exact else x[:, : size[0], : size[1]]
        return conv(conv_general_dilated=three_by_three)(x)


class DownBlock(nn.Module):
    """One level of the encoder; returns its output and the features of its skip connections.

    ``extra`` (T2I-Adapter) is added after the last attention, or, in a level without attention, to
    the output; the last skip connection has it, too.
    """

    resnet: Constructor
    attentions: Sequence[Constructor | None]  # one after each ResNet block
    downsample: Constructor | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        emb: Array,
        context: Array | None,
        mask: Array | None,
        train: bool,
        extra: Array | None = None,
    ) -> tuple[Array, list[Array]]:
        features = []
        for j, attention in enumerate(self.attentions):
            x = self.resnet(name=f"resnets_{j}")(x, emb, train)
            if attention is not None:
                x = attention(name=f"attentions_{j}")(x, context, mask)
            features.append(x)
        if attention is not None:
            x = features[-1] = added(x, extra)
        if self.downsample is not None:
            x = self.downsample(name="downsamplers_0")(x, emb, train)
            features.append(x)
        if attention is None:
            x = features[-1] = added(x, extra)
        return x, features


class MidBlock(nn.Module):
    """ResNet blocks at the lowest resolution, with attention between them where it is not None."""

    resnet: Constructor
    attention: Constructor | None
    blocks: int = 2

    @nn.compact
    def __call__(
        self, x: Array, emb: Array, context: Array | None, mask: Array | None, train: bool
    ) -> Array:
        for j in range(self.blocks):
            if j > 0 and self.attention is not None:
                x = self.attention(name=f"attentions_{j - 1}")(x, context, mask)
            x = self.resnet(name=f"resnets_{j}")(x, emb, train)
        return x


class UpBlock(nn.Module):
    """One level of the decoder; every ResNet block also reads one skip connection, last first.

    Autoencoders have None in place of each skip connection.
    """

    resnet: Constructor
    attentions: Sequence[Constructor | None]  # one after each ResNet block
    upsample: Constructor | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        skips: Sequence[Array | None],
        emb: Array | None,
        context: Array | None,
        mask: Array | None,
        train: bool,
        size: tuple[int, int] | None = None,
    ) -> Array:
        """``size`` (H, W) of the result, if its sides are not twice those of x."""
        for j, (skip, attention) in enumerate(zip(reversed(skips), self.attentions)):
            x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
            x = self.resnet(name=f"resnets_{j}")(x, emb, train)
            if attention is not None:
                x = attention(name=f"attentions_{j}")(x, context, mask)
        if self.upsample is not None:
            more = {} if size is None else {"size": size}
            x = self.upsample(name="upsamplers_0")(x, emb, train, **more)
        return x
