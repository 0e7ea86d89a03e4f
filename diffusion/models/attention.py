"""Attention, and the two forms in which U-Nets use it: over pixels, and as a transformer.

Submodules are named after diffusers' keys, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal, zeros

from diffusion.levels import Array
from diffusion.models.layers import GroupNorm, Pointwise


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """softmax(q k^T / sqrt(D)) v with the softmax in float32.

    Args:
      q: queries [B, L, H, D].
      k, v: keys and values [B, Lk, H, D].
      mask: [B, Lk] bool, True where a key is attended to; at least one per example.
      implementation: as in ``jax.nn.dot_product_attention``: 'xla', 'cudnn' (fp16 or bf16 only,
        D a multiple of 8), or None, which lets JAX choose.

    Returns:
      [B, L, H, D] in q's dtype.
    """
    if mask is not None:
        if mask.shape != k.shape[:2]:
            raise ValueError(
                f"mask has shape {mask.shape}; expected one bool per key, {k.shape[:2]}"
            )
        mask = mask.astype(jnp.bool_)[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def _project_and_attend(
    x: Array,
    context: Array,
    mask: Array | None,
    *,
    heads: int,
    bias: bool,
    zero_output: bool,
    implementation: str | None,
    dtype: jnp.dtype,
) -> Array:
    """to_q, to_k, to_v, attention, to_out_0, made in the calling module's own scope.

    x [B, L, C] attends to context [B, Lk, Cc]; returns [B, L, C].
    """
    width = x.shape[-1]

    def project(tokens: Array, name: str) -> Array:
        tokens = nn.Dense(width, use_bias=bias, dtype=dtype, name=name)(tokens)
        return tokens.reshape(*tokens.shape[:-1], heads, width // heads)

    q, k, v = project(x, "to_q"), project(context, "to_k"), project(context, "to_v")
    out = attend(q, k, v, mask, implementation).reshape(x.shape)
    init = zeros if zero_output else lecun_normal()
    return nn.Dense(width, dtype=dtype, kernel_init=init, name="to_out_0")(out)


class Attention(nn.Module):
    """Multi-head attention of x [B, L, C] to context [B, Lk, Cc], or to x itself without one."""

    heads: int
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> Array:
        return _project_and_attend(
            x,
            x if context is None else context,
            mask,
            heads=self.heads,
            bias=False,
            zero_output=False,
            implementation=self.implementation,
            dtype=self.dtype,
        )


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
        h = _project_and_attend(
            h,
            h,
            None,
            heads=self.heads,
            bias=True,
            zero_output=True,
            implementation=self.implementation,
            dtype=self.dtype,
        )
        return x + h.reshape(x.shape)


class GEGLU(nn.Module):
    """value * gelu(gate) of one projection to twice ``features``, with the exact gelu (erf)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(
            nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1
        )
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

    With ``only_cross_attention`` the first attention, too, is to the context (x4 upscaler).
    """

    heads: int
    only_cross_attention: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(self.heads, self.implementation, self.dtype, name=name)

        if self.only_cross_attention:
            x = x + attention("attn1")(norm("norm1")(x), context, mask)
        else:
            x = x + attention("attn1")(norm("norm1")(x))
        x = x + attention("attn2")(norm("norm2")(x), context, mask)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """x + transformer over the pixels of x [B, H, W, C], attending to context [B, L, Cc].

    The last projection starts at zero. ``linear_projection`` only says whether the checkpoints'
    projections are matrices (SD 2, SDXL) or 1 x 1 convolutions (SD 1).
    """

    heads: int
    depth: int = 1
    linear_projection: bool = False
    only_cross_attention: bool = False
    groups: int = 32
    remat: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        width = x.shape[-1]
        projection = nn.Dense if self.linear_projection else Pointwise
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock

        h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        h = h.reshape(h.shape[0], -1, width)
        h = projection(width, dtype=self.dtype, name="proj_in")(h)
        for k in range(self.depth):
            h = block(
                self.heads,
                self.only_cross_attention,
                self.implementation,
                self.dtype,
                name=f"transformer_blocks_{k}",
            )(h, context, mask)
        h = projection(width, dtype=self.dtype, kernel_init=zeros, name="proj_out")(h)
        return x + h.reshape(x.shape)
