"""T5's encoder (Raffel et al., 2020) and that of T5 v1.1, with gated MLPs (Shazeer, 2020).

Submodules are named after transformers' keys, with ``_`` for the dots before numbers; parameters
start as transformers' do.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal

from diffusion.levels import Array
from diffusion.models.attention import Attend


def buckets(length: int, count: int, furthest: int) -> np.ndarray:
    """[L, L] bucket in [0, count) of the distance from each query (row) to each key.

    Of the half for either direction, half the buckets are for exact distances, the others grow
    exponentially up to ``furthest``; the last one has all that is further.
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

    With ``positions`` (the first layer) it has the embeddings [buckets, heads] that the bias of all
    layers is made of, and no bias need be given.
    """

    heads: int
    head_width: int
    positions: tuple[int, int] | None
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, bias: Array | None) -> tuple[Array, Array]:
        inner, width = self.heads * self.head_width, x.shape[-1]

        def dense(features: int, deviation: float, name: str) -> nn.Dense:
            init = normal(deviation)
            return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        def project(name: str, deviation: float) -> Array:
            y = dense(inner, deviation, name)(x)
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
        return dense(width, inner**-0.5, "o")(out), bias


class T5MLP(nn.Module):
    """relu(x W_i) W_o, or (gelu(x W_0) * x W_1) W_o with the tanh gelu."""

    hidden: int
    gated: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(features: int, fan_in: int, name: str) -> nn.Dense:
            init = normal(fan_in**-0.5)
            return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        width = x.shape[-1]
        if self.gated:
            gate = jax.nn.gelu(dense(self.hidden, width, "wi_0")(x), approximate=True)
            h = gate * dense(self.hidden, width, "wi_1")(x)
        else:
            h = jax.nn.relu(dense(self.hidden, width, "wi")(x))
        return dense(width, self.hidden, "wo")(h)


class T5AttentionLayer(nn.Module):
    """x + attention of its norm."""

    heads: int
    head_width: int
    positions: tuple[int, int] | None
    eps: float
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, bias: Array | None) -> tuple[Array, Array]:
        h = nn.RMSNorm(epsilon=self.eps, dtype=self.dtype, name="layer_norm")(x)
        h, bias = T5Attention(
            self.heads,
            self.head_width,
            self.positions,
            self.implementation,
            self.dtype,
            name="SelfAttention",
        )(h, mask, bias)
        return x + h, bias


class T5MLPLayer(nn.Module):
    """x + MLP of its norm."""

    hidden: int
    gated: bool
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.RMSNorm(epsilon=self.eps, dtype=self.dtype, name="layer_norm")(x)
        return x + T5MLP(self.hidden, self.gated, self.dtype, name="DenseReluDense")(h)


class T5Block(nn.Module):
    """Attention and MLP; also gives the attention's bias, for the next block."""

    heads: int
    head_width: int
    hidden: int
    gated: bool
    positions: tuple[int, int] | None
    eps: float
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, bias: Array | None) -> tuple[Array, Array]:
        x, bias = T5AttentionLayer(
            self.heads,
            self.head_width,
            self.positions,
            self.eps,
            self.implementation,
            self.dtype,
            name="layer_0",
        )(x, mask, bias)
        return T5MLPLayer(self.hidden, self.gated, self.eps, self.dtype, name="layer_1")(x), bias


class T5Stack(nn.Module):
    """The blocks and the final norm."""

    depth: int
    heads: int
    head_width: int
    hidden: int
    gated: bool
    positions: tuple[int, int]
    eps: float
    remat: bool
    implementation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        block = nn.remat(T5Block) if self.remat else T5Block
        bias = None
        for i in range(self.depth):
            x, bias = block(
                self.heads,
                self.head_width,
                self.hidden,
                self.gated,
                self.positions if i == 0 else None,
                self.eps,
                self.implementation,
                self.dtype,
                name=f"block_{i}",
            )(x, mask, bias)
        return nn.RMSNorm(epsilon=self.eps, dtype=self.dtype, name="final_layer_norm")(x)


class T5Encoder(nn.Module):
    """T5's encoder.

    Attributes:
      vocab_size: number of tokens, padded to what the table has.
      width: of the tokens.
      depth, heads, head_width: layers, attention heads, width of each.
      hidden: width inside the MLPs.
      gated: v1.1's gated MLPs with the tanh gelu, instead of relu.
      buckets: of relative positions, for both directions together; a multiple of 4.
      furthest: distance from which on all are one bucket.
      eps: of the RMS norms.
      remat: recompute the blocks in the backward pass, to save memory.
      implementation: of the attention, as in ``attend``.
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
                "more than a quarter of it"
            )
        x = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=normal(1.0),
            dtype=self.dtype,
            name="shared",
        )(ids)
        stack = T5Stack(
            self.depth,
            self.heads,
            self.head_width,
            self.hidden,
            self.gated,
            (self.buckets, self.furthest),
            self.eps,
            self.remat,
            self.implementation,
            self.dtype,
            name="encoder",
        )
        return stack(x, mask)
