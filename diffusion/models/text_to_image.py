"""A denoiser with a text encoder of its own, trained together."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from diffusion.conditioning import Conditioning
from diffusion.levels import Array


class TextToImage(nn.Module):
    """``image``, conditioned on what ``text`` makes of ``cond.tokens``.

    Attributes:
      text: (tokens [B, L], mask [B, L]) -> ``Encoded``, as CLIP's text encoder.
      image: a denoiser's network, with cross-attention to ``cond.context``, with ``cond.pooled`` or
        with both.

    Raises ValueError, when called, if there are no tokens.
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
        seen = cond.replace(tokens=None, context=text.last, pooled=text.pooled)
        inner = {"features": features} if features else {}
        return self.image(x, time, seen, train=train, **inner)
