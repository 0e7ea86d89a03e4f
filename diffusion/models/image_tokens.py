"""From features of a picture to the tokens that an IP-Adapter attends to (Ye et al., 2023).

Each takes the features of a batch of pictures and gives tokens [B, N, width], as wide as the
network's context. Parameters have the published files' names, with ``_`` for the dots before
numbers.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.layers import LayerNorm

HEAD = 64
"""Width of the heads of every published resampler; files do not hold it."""

norm = partial(LayerNorm, epsilon=1e-5)


def gelu(x: Array) -> Array:
    """The exact gelu, x Phi(x)."""
    return nn.gelu(x, approximate=False)


class EmbeddingTokens(nn.Module):
    """LN(W f + b), cut into tokens, of an embedding f [B, D] (the first IP-Adapter).

    Attributes:
      tokens: their number N.
      width: of the network's context.
    """

    tokens: int
    width: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = nn.Dense(self.tokens * self.width, name="proj")(features)
        return norm(name="norm")(x.reshape(len(x), self.tokens, self.width))


class FaceTokens(nn.Module):
    """LN(W2 gelu(W1 f)), cut into tokens, of a face's embedding f [B, D] (FaceID).

    Attributes:
      tokens, width: as ``EmbeddingTokens``'.
      hidden: width between the two layers.
    """

    tokens: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = gelu(nn.Dense(self.hidden, name="proj_0")(features))
        x = nn.Dense(self.tokens * self.width, name="proj_2")(x)
        return norm(name="norm")(x.reshape(len(x), self.tokens, self.width))


class PatchTokens(nn.Module):
    """LN(W2 gelu(W1 f)) of each of the encoder's tokens f [B, N, D] (full-face)."""

    width: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = gelu(nn.Dense(features.shape[-1], name="proj_0")(features))
        return norm(name="proj_3")(nn.Dense(self.width, name="proj_2")(x))


class ResamplerLayer(nn.Module):
    """Latents z [B, N, W] attend to tokens x [B, L, W] and to themselves; then a GELU MLP."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        dense, width = partial(nn.Dense, use_bias=False), z.shape[-1]
        h = norm(name="norm2")(z)
        source = jnp.concatenate([norm(name="norm1")(x), h], axis=1)

        def by_head(a: Array) -> Array:
            return a.reshape(*a.shape[:-1], self.heads, HEAD)

        q = dense(self.heads * HEAD, name="to_q")(h)
        k, v = jnp.split(dense(2 * self.heads * HEAD, name="to_kv")(source), 2, axis=-1)
        out = Attend(False, name="attend")(by_head(q), by_head(k), by_head(v))
        z = z + dense(width, name="to_out")(out.reshape(q.shape))
        h = gelu(dense(4 * width, name="ff_1")(norm(name="ff_0")(z)))
        return z + dense(width, name="ff_3")(h)


class Resampler(nn.Module):
    """Learned latents that attend to the encoder's tokens f [B, L, D] (Plus; Alayrac et al., 2022).

    Attributes:
      tokens, width: as ``EmbeddingTokens``'.
      inner: width of the latents.
      heads: of the attention, each 64 wide.
      depth: number of layers.
    """

    tokens: int
    width: int
    inner: int
    heads: int
    depth: int = 4

    @nn.compact
    def __call__(self, features: Array) -> Array:
        init = nn.initializers.normal(self.inner**-0.5)
        latents = self.param("latents", init, (1, self.tokens, self.inner))
        x = nn.Dense(self.inner, name="proj_in")(features)
        z = jnp.broadcast_to(latents, (len(x), *latents.shape[1:]))
        for i in range(self.depth):
            z = ResamplerLayer(self.heads, name=f"layers_{i}")(x, z)
        return norm(name="norm_out")(nn.Dense(self.width, name="proj_out")(z))
