"""DINOv2's vision transformer (Oquab et al., 2024), whose features are those of image metrics.

Submodules are named after transformers' keys, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal, ones, zeros

from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.clip import gelu
from diffusion.models.fields import check_heads
from diffusion.models.layers import LayerNorm, Part


class LayerScale(nn.Module):
    """A learned factor per channel."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x * self.param("lambda1", ones, (x.shape[-1],)).astype(self.dtype)


class DinoEmbeddings(nn.Module):
    """A class token and patches with their positions, stretched to the image's: [B, 1 + N, D]."""

    size: int
    patch: int
    width: int
    mask_token: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        sides = (self.patch, self.patch)

        def project(images: Array) -> Array:  # [B, H, W, C] -> [B, h, w, D]
            conv = nn.Conv(self.width, sides, sides, "VALID", dtype=self.dtype, name="projection")
            return conv(images)

        x = Part(project, name="patch_embeddings")(images)
        batch, grid, side = len(x), x.shape[1:3], self.size // self.patch
        first = self.param("cls_token", normal(1e-6), (1, 1, self.width))
        if self.mask_token:  # of pre-training; weight files hold it
            self.param("mask_token", zeros, (1, self.width))
        positions = self.param(
            "position_embeddings", normal(0.02), (1, side**2 + 1, self.width)
        ).astype(jnp.float32)
        own = positions[0, 1:].reshape(side, side, self.width)
        if grid != (side, side):
            rows, columns = (cubic(side, n) for n in grid)
            own = jnp.einsum("ri,cj,ijd->rcd", rows, columns, own, precision="highest")
        first = jnp.broadcast_to(first + positions[:, :1], (batch, 1, self.width))
        x = (x + own[None]).reshape(batch, -1, self.width)
        return jnp.concatenate([first, x], axis=1).astype(self.dtype)


class DinoV2(nn.Module):
    """(images [B, H, W, C], normalised) -> tokens [B, 1 + H W / patch^2, D] after the last norm.

    The first token is the class token. H and W are multiples of the patch.

    Attributes:
      width, depth, heads: channels of a token, layers, attention heads.
      ratio: hidden width of the MLPs over width.
      size: side, in pixels, of the images that the positions are for; other images stretch them.
      patch: side of the patches, in pixels.
      channels: channels of the images.
      swiglu: whether the MLPs are SwiGLU (the giant network's).
      qkv_bias: whether queries, keys and values have a bias.
      mask_token: whether the parameters hold a mask token, which is not used.
      eps: of the norms.
      implementation: of the attention, as in ``kernels.attention.attend``.
      dtype: of the computation.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    ratio: int = 4
    size: int = 224
    patch: int = 14
    channels: int = 3
    swiglu: bool = False
    qkv_bias: bool = True
    mask_token: bool = True
    eps: float = 1e-6
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        check_heads(self)
        self.embeddings = DinoEmbeddings(
            self.size, self.patch, self.width, self.mask_token, self.dtype
        )
        self.encoder = Part(partial(_layers, self))
        self.layernorm = LayerNorm(epsilon=self.eps, dtype=self.dtype)

    def __call__(
        self, images: Array, features: Sequence[int] = ()
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """The tokens; with ``features``, also those after these layers, which count from 1."""
        height, width, channels = images.shape[1:]
        if channels != self.channels or height % self.patch or width % self.patch:
            raise ValueError(
                f"images {images.shape}; expected {self.channels} channels and sides that are "
                f"multiples of {self.patch}"
            )
        if any(not 1 <= i <= self.depth for i in features):
            raise ValueError(f"features={tuple(features)} must be layers 1..{self.depth}")
        after = self.encoder(self.embeddings(images))
        tokens = self.layernorm(after[-1])
        return (tokens, tuple(after[i - 1] for i in features)) if features else tokens


def cubic(old: int, new: int) -> np.ndarray:
    """[new, old]: PyTorch's bicubic interpolation of a line (a = -0.75, its ends repeated).

    As DINOv2 was trained; jax.image.resize has a = -0.5.
    """
    matrix, a = np.zeros((new, old), np.float32), -0.75
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        low = int(np.floor(at))
        for j in range(low - 1, low + 3):
            d = abs(at - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if d <= 1 else far
    return matrix


def _layers(net: DinoV2, x: Array) -> tuple[Array, ...]:
    """The tokens after each layer."""
    after = []
    for i in range(net.depth):
        x = Part(partial(_layer, net), name=f"layer_{i}")(x)
        after.append(x)
    return tuple(after)


def _layer(net: DinoV2, x: Array) -> Array:
    """Pre-norm attention and MLP on x [B, L, D]."""
    norm = partial(LayerNorm, epsilon=net.eps, dtype=net.dtype)
    h = Part(partial(_attention, net), name="attention")(norm(name="norm1")(x))
    x = x + LayerScale(net.dtype, name="layer_scale1")(h)
    h = Part(partial(_mlp, net), name="mlp")(norm(name="norm2")(x))
    return x + LayerScale(net.dtype, name="layer_scale2")(h)


def _attention(net: DinoV2, x: Array) -> Array:
    def heads(x: Array) -> Array:
        def project(name: str) -> Array:
            y = _dense(net, net.width, name, net.qkv_bias)(x)
            return y.reshape(*x.shape[:-1], net.heads, -1)

        q, k, v = project("query"), project("key"), project("value")
        return Attend(True, net.implementation, name="attend")(q, k, v).reshape(x.shape)

    def output(x: Array) -> Array:
        return _dense(net, net.width, "dense")(x)

    return Part(output, name="output")(Part(heads, name="attention")(x))


def _mlp(net: DinoV2, x: Array) -> Array:
    """Two layers with GELU between, or SwiGLU of two thirds of the width, rounded up to 8 n."""
    hidden = int(net.width * net.ratio)
    if not net.swiglu:
        h = gelu(_dense(net, hidden, "fc1")(x))
        return _dense(net, net.width, "fc2")(h)
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    gate, value = jnp.split(_dense(net, 2 * hidden, "weights_in")(x), 2, axis=-1)
    return _dense(net, net.width, "weights_out")(nn.silu(gate) * value)


def _dense(net: DinoV2, features: int, name: str, bias: bool = True) -> nn.Dense:
    init = nn.initializers.truncated_normal(0.02)
    return nn.Dense(features, use_bias=bias, kernel_init=init, dtype=net.dtype, name=name)
