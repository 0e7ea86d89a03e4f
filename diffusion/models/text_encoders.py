"""The text encoders of Stable Diffusion and SDXL as one module, to train with or through them."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.clip import ClipText


class Text(NamedTuple):
    """What a denoiser sees of texts.

    Attributes:
      last: [B, L, D], for cross-attention.
      pooled: [B, P], or None.
    """

    last: Array
    pooled: Array | None


class TextEncoders(nn.Module):
    """One or two of CLIP's text encoders, whose outputs stand side by side.

    Stable Diffusion takes the normed output of one. With ``penultimate`` it is what the last layer
    but one gives, and the last encoder's projection is the pooled embedding (SDXL).

    Attributes:
      encoders: of text.
      penultimate: whether the outputs are SDXL's.
    """

    encoders: tuple[ClipText, ...]
    penultimate: bool = False

    def __call__(self, ids: Array, mask: Array | None = None) -> Text:
        """Encodes texts, whose tokens ``ids`` [B, E, L] are those of each encoder's tokenizer."""
        if ids.ndim != 3 or ids.shape[1] != len(self.encoders):
            raise ValueError(f"tokens {ids.shape}; expected [B, {len(self.encoders)}, L]")
        outputs = [encoder(ids[:, i], mask) for i, encoder in enumerate(self.encoders)]
        contexts = [out.hidden[-2] if self.penultimate else out.last for out in outputs]
        return Text(jnp.concatenate(contexts, axis=-1), outputs[-1].projected)
