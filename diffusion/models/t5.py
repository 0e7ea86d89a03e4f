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
from diffusion.models.unet_blocks import Constructor


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


class T5Attention(nn.Module):
    """Self-attention of x [B, L, D] without scaling; ``bias`` is added to the logits.

    With ``positions`` = (buckets, furthest), in the first layer, it has the embeddings
    [buckets, heads] of relative positions and makes the bias of all layers from them.
    """

    heads: int
    head_width: int
    positions: tuple[int, int] | None
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, bias: Array | None) -> tuple[Array, Array]:
        inner, width = self.heads * self.head_width, x.shape[-1]

        def project(name: str, deviation: float) -> Array:
            y = _dense(inner, deviation, self.dtype, name)(x)
            return y.reshape(*x.shape[:-1], self.heads, self.head_width)

        q = project("q", (width * self.head_width) ** -0.5)
        k, v = project("k", width**-0.5), project("v", width**-0.5)
        if self.positions is not None:
            table = nn.Embed(
                self.positions[0],
                self.heads,
                embedding_init=normal(width**-0.5),
                dtype=self.dtype,
                name="relative_attention_bias",
            )
            bias = table(buckets(x.shape[1], *self.positions)).transpose(2, 0, 1)[None]
        attend = Attend(True, self.implementation, name="attend")
        out = attend(q, k, v, mask, bias=bias, scale=1.0).reshape(*x.shape[:-1], inner)
        return _dense(width, inner**-0.5, self.dtype, "o")(out), bias


class T5MLP(nn.Module):
    """relu(x W_i) W_o, or (gelu(x W_0) * x W_1) W_o with the tanh gelu."""

    hidden: int
    gated: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]

        def hidden(name: str) -> Array:
            return _dense(self.hidden, width**-0.5, self.dtype, name)(x)

        if self.gated:
            h = jax.nn.gelu(hidden("wi_0"), approximate=True) * hidden("wi_1")
        else:
            h = jax.nn.relu(hidden("wi"))
        return _dense(width, self.hidden**-0.5, self.dtype, "wo")(h)


class T5Sublayer(nn.Module):
    """A layer, given by its constructor, of the RMS norm of x."""

    layer: Constructor
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, *inputs: Array | None) -> Array | tuple[Array, Array]:
        h = nn.RMSNorm(epsilon=self.eps, dtype=self.dtype, name="layer_norm")(x)
        return self.layer()(h, *inputs)


class T5Block(nn.Module):
    """Residual attention and MLP; also returns the attention's bias, for the next block."""

    attention: Constructor
    mlp: Constructor
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, bias: Array | None) -> tuple[Array, Array]:
        h, bias = T5Sublayer(self.attention, self.eps, self.dtype, name="layer_0")(x, mask, bias)
        x = x + h
        return x + T5Sublayer(self.mlp, self.eps, self.dtype, name="layer_1")(x), bias


class T5Stack(nn.Module):
    """The blocks, of which only the first has ``positions``, and the final norm."""

    depth: int
    attention: Constructor
    mlp: Constructor
    positions: tuple[int, int]
    eps: float
    remat: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        block = nn.remat(T5Block) if self.remat else T5Block
        bias = None
        for i in range(self.depth):
            attention = partial(self.attention, positions=self.positions if i == 0 else None)
            layer = block(attention, self.mlp, self.eps, self.dtype, name=f"block_{i}")
            x, bias = layer(x, mask, bias)
        return nn.RMSNorm(epsilon=self.eps, dtype=self.dtype, name="final_layer_norm")(x)


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
        init, dtype = normal(1.0), self.dtype
        table = nn.Embed(self.vocab_size, self.width, dtype, embedding_init=init, name="shared")
        attention = partial(
            T5Attention,
            heads=self.heads,
            head_width=self.head_width,
            implementation=self.implementation,
            dtype=dtype,
            name="SelfAttention",
        )
        mlp = partial(T5MLP, self.hidden, self.gated, dtype, name="DenseReluDense")
        positions = (self.buckets, self.furthest)
        stack = T5Stack(
            self.depth, attention, mlp, positions, self.eps, self.remat, dtype, name="encoder"
        )
        return stack(table(ids), mask)


def _dense(features: int, deviation: float, dtype: jnp.dtype, name: str) -> nn.Dense:
    init = normal(deviation)
    return nn.Dense(features, use_bias=False, kernel_init=init, dtype=dtype, name=name)
