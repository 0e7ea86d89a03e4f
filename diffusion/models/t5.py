"""T5's encoder (Raffel et al., 2020) and that of T5 v1.1, with gated MLPs (Shazeer, 2020).

Submodules are named after transformers' keys, with ``_`` for the dots before numbers; parameters
start as transformers' do.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal

from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.layers import Part


def buckets(length: int, count: int, furthest: int) -> np.ndarray:
    """[L, L] bucket in [0, count) of the distance from each query (row) to each key.

    Half of the buckets are for keys before the query, half for keys after it. Of each half, the
    first half are exact distances, and the others grow exponentially up to ``furthest``; the last
    one holds all larger distances.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = count // 2
    exact = half // 2
    # In float32, as T5 was trained: rounding decides at the edges of buckets.
    far = np.log(np.maximum(abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(furthest / exact)) * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int32), half - 1)
    return half * (distance > 0) + np.where(abs(distance) < exact, abs(distance), far)


class T5Encoder(nn.Module):
    """T5's encoder.

    Attributes:
      vocab_size: rows of the table of tokens, padding included.
      width: channels of a token.
      depth, heads, head_width: layers, attention heads, channels per head.
      hidden: width inside the MLPs.
      gated: whether MLPs are v1.1's gated ones with the tanh gelu, instead of relu.
      buckets: of relative positions, for both directions together; a multiple of 4.
      furthest: distance from which on all are one bucket.
      eps: of the RMS norms.
      remat: whether the backward pass recomputes the blocks, to save memory.
      implementation: of the attention, as in ``kernels.attention.attend``.
      dtype: of the computation; norms and softmax are in float32. T5's activations overflow
        float16; bfloat16 has room for them.
    """

    vocab_size: int = 32_128
    width: int = 512
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    hidden: int = 2048
    gated: bool = False
    buckets: int = 32
    furthest: int = 128
    eps: float = 1e-6
    remat: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> Array:
        """[B, L, width] of tokens [B, L] int; mask [B, L] bool, True where one is attended to."""
        if self.buckets < 4 or self.buckets % 4 or self.furthest <= self.buckets // 4:
            raise ValueError(
                f"buckets={self.buckets}, furthest={self.furthest}: expected a multiple of 4, and "
                "furthest above a quarter of it"
            )
        table = nn.Embed(
            self.vocab_size, self.width, self.dtype, embedding_init=normal(1.0), name="shared"
        )
        return Part(partial(_stack, self), name="encoder")(table(ids), mask)


def _stack(net: T5Encoder, x: Array, mask: Array | None) -> Array:
    """The blocks and the final norm. The first block makes the bias of all attention logits."""
    block, bias = nn.remat(Part) if net.remat else Part, None
    for i in range(net.depth):
        x, bias = block(partial(_block, net), name=f"block_{i}")(x, mask, bias)
    return _norm(net, "final_layer_norm")(x)


def _block(net: T5Encoder, x: Array, mask: Array | None, bias: Array | None) -> tuple[Array, Array]:
    """Residual attention and MLP, and the bias for the next block."""

    def attention(x: Array) -> tuple[Array, Array]:
        h = _norm(net, "layer_norm")(x)
        return Part(partial(_attention, net), name="SelfAttention")(h, mask, bias)

    def mlp(x: Array) -> Array:
        return Part(partial(_mlp, net), name="DenseReluDense")(_norm(net, "layer_norm")(x))

    h, bias = Part(attention, name="layer_0")(x)
    x = x + h
    return x + Part(mlp, name="layer_1")(x), bias


def _attention(
    net: T5Encoder, x: Array, mask: Array | None, bias: Array | None
) -> tuple[Array, Array]:
    """Self-attention without scaling. Without a bias it is made from embeddings of distances."""
    inner, width = net.heads * net.head_width, x.shape[-1]

    def project(name: str, deviation: float) -> Array:
        y = _dense(net, inner, deviation, name)(x)
        return y.reshape(*x.shape[:-1], net.heads, net.head_width)

    q = project("q", (width * net.head_width) ** -0.5)
    k, v = project("k", width**-0.5), project("v", width**-0.5)
    if bias is None:
        init, name = normal(width**-0.5), "relative_attention_bias"
        table = nn.Embed(net.buckets, net.heads, net.dtype, embedding_init=init, name=name)
        distances = buckets(x.shape[1], net.buckets, net.furthest)
        bias = table(distances).transpose(2, 0, 1)[None]
    attend = Attend(True, net.implementation, name="attend")
    out = attend(q, k, v, mask, bias=bias, scale=1.0).reshape(*x.shape[:-1], inner)
    return _dense(net, width, inner**-0.5, "o")(out), bias


def _mlp(net: T5Encoder, x: Array) -> Array:
    """relu(x W_i) W_o, or (gelu(x W_0) * x W_1) W_o with the tanh gelu."""
    width = x.shape[-1]
    hidden = partial(_dense, net, net.hidden, width**-0.5)
    if net.gated:
        h = jax.nn.gelu(hidden("wi_0")(x), approximate=True) * hidden("wi_1")(x)
    else:
        h = jax.nn.relu(hidden("wi")(x))
    return _dense(net, width, net.hidden**-0.5, "wo")(h)


def _norm(net: T5Encoder, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=net.eps, dtype=net.dtype, name=name)


def _dense(net: T5Encoder, features: int, deviation: float, name: str) -> nn.Dense:
    init = normal(deviation)
    return nn.Dense(features, use_bias=False, kernel_init=init, dtype=net.dtype, name=name)
