"""DINOv2's vision transformer (Oquab et al., 2024), whose features are those of image metrics.

Submodules are named after transformers' keys, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal, ones, zeros

from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.clip import gelu
from diffusion.models.fields import nearest_divisors
from diffusion.models.layers import LayerNorm
from diffusion.models.unet_blocks import Constructor


class DinoSelfAttention(nn.Module):
    """Multi-head attention of x [B, L, D] to itself, without the projection that follows."""

    heads: int
    bias: bool
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def project(name: str) -> Array:
            y = _dense(x.shape[-1], self.dtype, name, self.bias)(x)
            return y.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

        q, k, v = project("query"), project("key"), project("value")
        return Attend(True, self.implementation, name="attend")(q, k, v).reshape(x.shape)


class DinoOutput(nn.Module):
    """The projection, in a module of its own as in transformers."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _dense(x.shape[-1], self.dtype, "dense")(x)


class DinoAttention(nn.Module):
    """Self-attention and the projection that follows."""

    heads: int
    bias: bool
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        attention = DinoSelfAttention(
            self.heads, self.bias, self.implementation, self.dtype, name="attention"
        )
        return DinoOutput(self.dtype, name="output")(attention(x))


class DinoMLP(nn.Module):
    """Two layers with GELU between, or SwiGLU of two thirds of the width, rounded up to 8 n."""

    ratio: int
    swiglu: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, hidden = x.shape[-1], int(x.shape[-1] * self.ratio)
        if not self.swiglu:
            h = gelu(_dense(hidden, self.dtype, "fc1")(x))
            return _dense(width, self.dtype, "fc2")(h)
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        gate, value = jnp.split(_dense(2 * hidden, self.dtype, "weights_in")(x), 2, axis=-1)
        return _dense(width, self.dtype, "weights_out")(nn.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor per channel."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x * self.param("lambda1", ones, (x.shape[-1],)).astype(self.dtype)


class DinoLayer(nn.Module):
    """Pre-norm transformer layer on x [B, L, D]."""

    heads: int
    ratio: int
    swiglu: bool
    bias: bool
    eps: float
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=self.eps, dtype=self.dtype, name=name)

        attention = DinoAttention(
            self.heads, self.bias, self.implementation, self.dtype, name="attention"
        )
        x = x + LayerScale(self.dtype, name="layer_scale1")(attention(norm("norm1")(x)))
        mlp = DinoMLP(self.ratio, self.swiglu, self.dtype, name="mlp")
        return x + LayerScale(self.dtype, name="layer_scale2")(mlp(norm("norm2")(x)))


class DinoEncoder(nn.Module):
    """``depth`` layers, given by their constructor."""

    depth: int
    layer: Constructor

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.depth):
            x = self.layer(name=f"layer_{i}")(x)
        return x


class DinoPatches(nn.Module):
    """Patches of images [B, H, W, C], projected: [B, h, w, D]."""

    patch: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        sides = (self.patch, self.patch)
        projection = nn.Conv(self.width, sides, sides, "VALID", dtype=self.dtype, name="projection")
        return projection(images)


class DinoEmbeddings(nn.Module):
    """A class token and patches with their positions, stretched to the image's: [B, 1 + N, D]."""

    size: int
    patch: int
    width: int
    mask_token: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = DinoPatches(self.patch, self.width, self.dtype, name="patch_embeddings")(images)
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
        if self.width % self.heads:
            raise ValueError(
                f"width={self.width} cannot be split into heads={self.heads}; nearest: "
                f"{nearest_divisors(self.width, self.heads)}"
            )
        self.embeddings = DinoEmbeddings(
            self.size, self.patch, self.width, self.mask_token, self.dtype
        )
        fields = (self.heads, self.ratio, self.swiglu, self.qkv_bias, self.eps)
        layer = partial(DinoLayer, *fields, self.implementation, self.dtype)
        self.encoder = DinoEncoder(self.depth, layer)
        self.layernorm = LayerNorm(epsilon=self.eps, dtype=self.dtype)

    def __call__(self, images: Array) -> Array:
        height, width, channels = images.shape[1:]
        if channels != self.channels or height % self.patch or width % self.patch:
            raise ValueError(
                f"images {images.shape}; expected {self.channels} channels and sides that are "
                f"multiples of {self.patch}"
            )
        return self.layernorm(self.encoder(self.embeddings(images)))


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


def _dense(features: int, dtype: jnp.dtype, name: str, bias: bool = True) -> nn.Dense:
    init = nn.initializers.truncated_normal(0.02)
    return nn.Dense(features, use_bias=bias, kernel_init=init, dtype=dtype, name=name)
