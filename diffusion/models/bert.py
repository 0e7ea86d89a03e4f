"""BERT's encoder (Devlin et al., 2019), of which sentence encoders are made.

Submodules are named after transformers' keys, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.clip import gelu
from diffusion.models.fields import check_heads
from diffusion.models.layers import LayerNorm, Part


class Bert(nn.Module):
    """(ids [B, L], mask [B, L]) -> the last layer's tokens [B, L, D].

    Norms follow the sums, and tokens attend to all tokens of the mask. Every text is a single
    segment.

    Attributes:
      vocab_size: number of tokens.
      width, depth, heads, hidden: channels of a token, layers, attention heads, width inside MLPs.
      length: largest number of tokens in a text.
      segments: kinds of segments that the parameters hold; the first is used.
      eps: of the norms.
      implementation: of the attention, as in ``kernels.attention.attend``.
      dtype: of the computation; norms and softmax are in float32.
    """

    vocab_size: int = 30_522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    length: int = 512
    segments: int = 2
    eps: float = 1e-12
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        check_heads(self)
        self.embeddings = Part(partial(_embed, self))
        self.encoder = Part(partial(_layers, self))

    def __call__(self, ids: Array, mask: Array | None = None) -> Array:
        if ids.shape[1] > self.length:
            raise ValueError(f"{ids.shape[1]} tokens; the encoder takes at most {self.length}")
        return self.encoder(self.embeddings(ids), mask)


def sentence(tokens: Array, mask: Array) -> Array:
    """The mean [B, D] of the tokens [B, L, D] in a mask [B, L], scaled to unit norm.

    Reimers and Gurevych, 2019, "Sentence-BERT".
    """
    weight = mask[..., None].astype(tokens.dtype)
    mean = (tokens * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _embed(net: Bert, ids: Array) -> Array:
    """The norm of the embeddings of tokens [B, L], of their places and of the first segment."""
    embed = partial(nn.Embed, features=net.width, dtype=net.dtype, embedding_init=normal(0.02))
    tokens = embed(net.vocab_size, name="word_embeddings")(ids)
    places = embed(net.length, name="position_embeddings")(jnp.arange(ids.shape[1]))
    segment = embed(net.segments, name="token_type_embeddings")(jnp.zeros(1, int))
    return _norm(net)(tokens + places[None] + segment[None])


def _layers(net: Bert, x: Array, mask: Array | None) -> Array:
    for i in range(net.depth):
        x = Part(partial(_layer, net), name=f"layer_{i}")(x, mask)
    return x


def _layer(net: Bert, x: Array, mask: Array | None) -> Array:
    """Attention and MLP on x [B, L, D], each followed by a norm of its sum with x."""

    def attend(x: Array, mask: Array | None) -> Array:
        def inner(x: Array, mask: Array | None) -> Array:
            def project(name: str) -> Array:
                return _dense(net, net.width, name)(x).reshape(*x.shape[:-1], net.heads, -1)

            q, k, v = project("query"), project("key"), project("value")
            return Attend(True, net.implementation, name="attend")(q, k, v, mask).reshape(x.shape)

        h = Part(inner, name="self")(x, mask)
        return Part(partial(_output, net), name="output")(h, x)

    x = Part(attend, name="attention")(x, mask)
    h = gelu(Part(lambda x: _dense(net, net.hidden, "dense")(x), name="intermediate")(x))
    return Part(partial(_output, net), name="output")(h, x)


def _output(net: Bert, h: Array, x: Array) -> Array:
    return _norm(net)(_dense(net, net.width, "dense")(h) + x)


def _norm(net: Bert) -> LayerNorm:
    return LayerNorm(epsilon=net.eps, dtype=net.dtype, name="LayerNorm")


def _dense(net: Bert, features: int, name: str) -> nn.Dense:
    init = normal(0.02)
    return nn.Dense(features, kernel_init=init, bias_init=zeros, dtype=net.dtype, name=name)
