"""A denoiser's network together with a text encoder, both trained at once."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from diffusion.conditioning import Conditioning
from diffusion.levels import Array


class TextToImage(nn.Module):
    """``image``, conditioned on the embeddings that ``text`` computes from ``cond.tokens``.

    Attributes:
      text: (tokens [B, L], mask [B, L]) -> ``Encoded``, like CLIP's text encoder.
      image: a denoiser's network, with cross-attention to ``cond.context``, with ``cond.pooled`` or
        with both.
    """

    text: nn.Module
    image: nn.Module

    def __call__(
        self,
        x: Array,
        time: Array,
        cond: Conditioning,
        *,
        train: bool = False,
        features: Sequence[int] = (),
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """``image``'s output; ``cond.context_mask`` [B, L] is True where there is text."""
        if cond.tokens is None:
            raise ValueError("this network reads captions: cond.tokens [B, L] is missing")
        text = self.text(cond.tokens, cond.context_mask)
        cond = cond.replace(tokens=None, context=text.last, pooled=text.pooled)
        options = {"features": features} if features else {}
        return self.image(x, time, cond, train=train, **options)
