"""Attention, and the two forms in which U-Nets use it: over pixels, and as a transformer.

Submodules are named after diffusers' keys, with ``_`` for the dots before numbers. Every network
computes its attention maps with an ``Attend``. It has no parameters; it is a module so that
``identity_maps`` and ``token_merging`` can find and change it from outside the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import zeros

from diffusion.levels import Array
from diffusion.models.kernels.attention import attend
from diffusion.models.layers import GroupNorm, LayerNorm, Pointwise


class Attend(nn.Module):
    """``attend`` as a module without parameters; ``to_itself`` marks self-attention."""

    to_itself: bool
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, q: Array, k: Array, v: Array, mask: Array | None = None, **options: Any
    ) -> Array:
        return attend(q, k, v, mask, self.implementation, **options)


class Attention(nn.Module):
    """Multi-head attention of x [B, L, C] to context [B, Lk, Cc], or to x itself without one.

    With ``upcast`` queries, keys and values are float32 whatever dtype is.
    """

    heads: int
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> Array:
        return _multi_head(self, x, context, mask, upcast=self.upcast)


class SpatialAttention(nn.Module):
    """x + attention of every pixel to all of them (DDPM, ADM); x is [B, H, W, C].

    The output projection starts at zero. Context and mask are not used: the signature is
    ``SpatialTransformer``'s.
    """

    heads: int = 1
    groups: int = 32
    eps: float = 1e-5
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> Array:
        h = GroupNorm(self.groups, self.eps, self.dtype, name="group_norm")(x)
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        return x + _multi_head(self, h, bias=True, init=zeros).reshape(x.shape)


def _multi_head(
    net: Attention | SpatialAttention,
    x: Array,
    context: Array | None = None,
    mask: Array | None = None,
    *,
    bias: bool = False,
    init: nn.initializers.Initializer = nn.linear.default_kernel_init,
    upcast: bool = False,
) -> Array:
    """to_q, to_k, to_v, attention and to_out_0, as submodules of ``net``: [B, L, C]."""
    width, dtype = x.shape[-1], net.dtype
    source = x if context is None else context

    def project(tokens: Array, name: str) -> Array:
        tokens = nn.Dense(width, use_bias=bias, dtype=dtype, name=name)(tokens)
        tokens = tokens.reshape(*tokens.shape[:-1], net.heads, width // net.heads)
        return tokens.astype(jnp.float32) if upcast else tokens

    q, k, v = project(x, "to_q"), project(source, "to_k"), project(source, "to_v")
    out = Attend(context is None, net.implementation, name="attend")(q, k, v, mask)
    output = nn.Dense(width, dtype=dtype, kernel_init=init, name="to_out_0")
    return output(out.reshape(x.shape))


class GEGLU(nn.Module):
    """value * gelu(gate), both from one projection, with the exact gelu (erf)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
        value, gate = jnp.split(h, 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and GEGLU on x [B, L, C] (latent diffusion).

    With ``only_cross_attention`` the first attention is to the context as well (x4 upscaler).
    ``Attention`` describes ``upcast``.
    """

    heads: int
    only_cross_attention: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        norm = partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
        fields = (self.heads, self.implementation, self.dtype, self.upcast)
        first = (context, mask) if self.only_cross_attention else ()
        x = x + Attention(*fields, name="attn1")(norm(name="norm1")(x), *first)
        x = x + Attention(*fields, name="attn2")(norm(name="norm2")(x), context, mask)
        return x + FeedForward(self.dtype, name="ff")(norm(name="norm3")(x))


class SpatialTransformer(nn.Module):
    """x + transformer over the pixels of x [B, H, W, C], attending to context [B, L, Cc].

    With ``depth=0`` there are only the norm and both projections (small ControlNets of SDXL).

    The last projection starts at zero. With ``linear_projection`` the projections' kernels are
    matrices (SD 2, SDXL), without it those of 1 x 1 convolutions (SD 1); the result is the same.
    ``Attention`` describes ``upcast``.
    """

    heads: int
    depth: int = 1
    linear_projection: bool = False
    only_cross_attention: bool = False
    groups: int = 32
    remat: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array | None, mask: Array | None = None) -> Array:
        width = x.shape[-1]
        projection = nn.Dense if self.linear_projection else Pointwise
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        fields = (self.heads, self.only_cross_attention, self.implementation, self.dtype)
        h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        h = h.reshape(h.shape[0], -1, width)
        h = projection(width, dtype=self.dtype, name="proj_in")(h)
        for k in range(self.depth):
            layer = block(*fields, self.upcast, name=f"transformer_blocks_{k}")
            h = layer(h, context, mask)
        h = projection(width, dtype=self.dtype, kernel_init=zeros, name="proj_out")(h)
        return x + h.reshape(x.shape)
