"""Attention, and the two forms in which U-Nets use it: over pixels, and as a transformer.

Submodules are named after diffusers' keys, with ``_`` for the dots before numbers. Every network's
attention maps are computed by an ``Attend``, which has no parameters and stands in the module tree
only to be found there: ``with_identity_maps`` takes hold of it from outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal, zeros

from diffusion.levels import Array
from diffusion.models.kernels import fused_attention
from diffusion.models.layers import GroupNorm, LayerNorm, Pointwise


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    implementation: str | None = None,
    *,
    causal: bool = False,
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """softmax(scale q k^T + bias) v with the softmax in float32.

    Args:
      q: queries [B, L, H, D].
      k, v: keys and values [B, Lk, H, D].
      mask: [B, Lk] bool, True where a key is attended to; at least one per example.
      implementation: as in ``jax.nn.dot_product_attention``: 'xla', 'cudnn' (fp16 or bf16 only,
        D a multiple of 8), or None for what is best here: without mask and the options below
        cuDNN's where it can (``fused_attention.suits``), and on a CPU ``attend_by_products``,
        large maps in blocks.
      causal: whether a token attends only to itself and to those before it.
      bias: added to the logits, [1 or B, 1 or H, L, Lk].
      scale: of the logits; 1 / sqrt(D) by default.

    Returns:
      [B, L, H, D] in q's dtype.
    """
    if mask is not None:
        if mask.shape != k.shape[:2]:
            raise ValueError(
                f"mask has shape {mask.shape}; expected one bool per key, {k.shape[:2]}"
            )
        mask = mask.astype(jnp.bool_)
    plain = implementation is None and not causal and bias is None and scale is None
    if plain and mask is None and fused_attention.suits(q, k, v):
        return fused_attention.attend_cudnn(q, k, v)
    if plain and jax.default_backend() == "cpu":
        large = q.shape[1] * k.shape[1] >= 2**18
        return (attend_in_blocks if large else attend_by_products)(q, k, v, mask)
    mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=scale, is_causal=causal, implementation=implementation
    )


def attend_by_products(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """``attend`` as two matrix products per head; weights are divided by their sum at the end.

    On a CPU it takes 0.6 to 0.8 of the time of ``jax.nn.dot_product_attention``.
    """
    b, length, heads, width = q.shape
    mask = None if mask is None else jnp.repeat(mask, heads, axis=0)[:, None, :]
    out = _weighted_mean(_by_head(q), _by_head(k), _by_head(v), mask)
    return out.reshape(b, heads, length, width).swapaxes(1, 2)


def attend_in_blocks(
    q: Array, k: Array, v: Array, mask: Array | None = None, entries: int = 2**20
) -> Array:
    """``attend_by_products``, one head and one block of queries at a time.

    A block's map has at most ``entries`` numbers, so that it stays in a processor's cache: at 4096
    pixels 5 to 10 times as fast there as all maps at once, and without their memory.
    """
    b, length, heads, width = q.shape
    count = min(-(-length * k.shape[1] // entries), length)
    size = -(-length // count)  # queries per block; the last block is filled up
    q = jnp.pad(q, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))

    def of_head(head: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, mask = head
        blocks = q.reshape(count, size, width)
        return jax.lax.map(lambda block: _weighted_mean(block, k, v, mask), blocks)

    mask = None if mask is None else jnp.repeat(mask, heads, axis=0)
    out = jax.lax.map(of_head, (_by_head(q), _by_head(k), _by_head(v), mask))
    return out.reshape(b, heads, count * size, width).swapaxes(1, 2)[:, :length]


def _by_head(a: Array) -> Array:
    """[B, L, H, D] -> [B H, L, D]."""
    b, length, heads, width = a.shape
    return a.swapaxes(1, 2).reshape(b * heads, length, width)


def _weighted_mean(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of one head, or of several along the first axis: q [..., L, D] -> [..., L, D]."""
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    scores = scores / q.shape[-1] ** 0.5
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)


class Attend(nn.Module):
    """``attend`` as a module without parameters; ``to_itself``: whether it is self-attention."""

    to_itself: bool
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, q: Array, k: Array, v: Array, mask: Array | None = None, **options: Any
    ) -> Array:
        return attend(q, k, v, mask, self.implementation, **options)


def with_identity_maps(function: Callable[..., Any], blocks: str) -> Callable[..., Any]:
    """``function`` with some networks' self-attention maps replaced by the identity.

    Every token then gets its own value: what the perturbed estimate of perturbed-attention
    guidance is (Ahn et al., 2024). Parameters are the same, cross-attention is left alone.

    Args:
      function: calls the network when it is called (a denoiser does); not jitted by itself, since
        what was traced before would be used again.
      blocks: regular expression, searched for in the attentions' paths in the module tree
        (``self_attention_paths``): ``mid_block``, ``blocks_(3|4)/``. In a DiT with ``scan=True``
        all blocks have one path.
    """

    def identity(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        attends = isinstance(module, Attend) and context.method_name == "__call__"
        if attends and module.to_itself and re.search(blocks, _path(module)):
            return args[2]
        return call(*args, **kwargs)

    def changed(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(identity):
            return function(*args, **kwargs)

    return changed


def self_attention_paths(function: Callable[..., Any], *args: Any) -> list[str]:
    """Paths of the self-attentions that ``function(*args)`` calls: "mid_block/attentions_0/", ...

    Nothing is computed: args may be ``jax.ShapeDtypeStruct``.
    """
    paths = []

    def note(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, Attend) and context.module.to_itself:
            paths.append(_path(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(function, *args)
    return sorted(set(paths))


def middle_block(paths: Sequence[str]) -> str:
    """Regular expression of the middle self-attentions among ``self_attention_paths``' paths.

    A U-Net's are those of its mid block. Of numbered blocks, a DiT's, it is the middle one; blocks
    that are scanned over have one path.
    """
    numbers = [found[1] for path in paths if (found := re.search(r"(?:^|/)blocks_(\d+)/", path))]
    if any("mid_block/" in path for path in paths) or not paths:
        return "mid_block/"
    return f"blocks_{len(set(numbers)) // 2}/" if numbers else "blocks/"


def _path(attend: Attend) -> str:
    """Of the module that it works for, with a slash at the end."""
    return "/".join(attend.path[:-1]) + "/"


def _project_and_attend(
    x: Array,
    context: Array | None,
    mask: Array | None,
    *,
    heads: int,
    bias: bool,
    zero_output: bool,
    implementation: str | None,
    dtype: jnp.dtype,
    upcast: bool = False,
) -> Array:
    """to_q, to_k, to_v, attention, to_out_0, made in the calling module's own scope.

    x [B, L, C] attends to context [B, Lk, Cc], or to itself without one; returns [B, L, C].
    """
    width = x.shape[-1]
    source = x if context is None else context

    def project(tokens: Array, name: str) -> Array:
        tokens = nn.Dense(width, use_bias=bias, dtype=dtype, name=name)(tokens)
        tokens = tokens.reshape(*tokens.shape[:-1], heads, width // heads)
        return tokens.astype(jnp.float32) if upcast else tokens

    q, k, v = project(x, "to_q"), project(source, "to_k"), project(source, "to_v")
    out = Attend(context is None, implementation, name="attend")(q, k, v, mask).reshape(x.shape)
    init = zeros if zero_output else lecun_normal()
    return nn.Dense(width, dtype=dtype, kernel_init=init, name="to_out_0")(out)


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
        return _project_and_attend(
            x,
            context,
            mask,
            heads=self.heads,
            bias=False,
            zero_output=False,
            implementation=self.implementation,
            dtype=self.dtype,
            upcast=self.upcast,
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
            None,
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
    ``upcast``: see ``Attention``.
    """

    heads: int
    only_cross_attention: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(self.heads, self.implementation, self.dtype, self.upcast, name=name)

        if self.only_cross_attention:
            x = x + attention("attn1")(norm("norm1")(x), context, mask)
        else:
            x = x + attention("attn1")(norm("norm1")(x))
        x = x + attention("attn2")(norm("norm2")(x), context, mask)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """x + transformer over the pixels of x [B, H, W, C], attending to context [B, L, Cc].

    The last projection starts at zero. ``linear_projection`` only says whether the checkpoints'
    projections are matrices (SD 2, SDXL) or 1 x 1 convolutions (SD 1). ``upcast``: see
    ``Attention``.
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
                self.upcast,
                name=f"transformer_blocks_{k}",
            )(h, context, mask)
        h = projection(width, dtype=self.dtype, kernel_init=zeros, name="proj_out")(h)
        return x + h.reshape(x.shape)
