"""A denoiser with a text encoder of its own, trained together."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.attention import Attention


class TextEncoder(nn.Module):
    """Small bidirectional transformer over tokens."""

    vocabulary: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        x = nn.Embed(self.vocabulary, self.width, embedding_init=nn.initializers.normal(0.5))(
            tokens
        )
        x = x + self.param("position", nn.initializers.normal(0.2), (tokens.shape[1], self.width))
        for i in range(self.depth):
            h = Attention(self.heads, name=f"attn_{i}")(nn.LayerNorm()(x), None, mask)
            x = x + h
            h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(h))
        x = nn.LayerNorm()(x)
        last = mask.sum(-1) - 1
        return x, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


class TextToImage(nn.Module):
    """``image``, conditioned on what ``text`` makes of ``cond.tokens``.

    Attributes:
      text: (tokens [B, L], mask [B, L]) -> (context [B, L, C], pooled [B, P]).
      image: a denoiser's network, with cross-attention to ``cond.context``, with ``cond.pooled`` or
        with both.

    Raises ValueError, when called, if there are no tokens.
    """

    text: nn.Module
    image: nn.Module

    def __call__(self, x: Array, time: Array, cond: Conditioning, *, train: bool = False) -> Array:
        """``image``'s output; ``cond.context_mask`` [B, L] is True where there is text."""
        if cond.tokens is None:
            raise ValueError("this network reads captions: cond.tokens [B, L] is missing")
        context, pooled = self.text(cond.tokens, cond.context_mask)
        seen = cond.replace(tokens=None, context=context, pooled=pooled)
        return self.image(x, time, seen, train=train)
