"""All conditioning signals of a network in one batch-first structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import flax.struct
import jax
import jax.numpy as jnp

from diffusion.levels import Array


@flax.struct.dataclass
class Conditioning:
    """Optional conditioning signals, each with the batch as its first axis.

    Attributes:
      label: [B] int class index; the network's null class is ``num_classes``.
      tokens: [B, L] int, a caption, for networks that contain a text encoder.
      context: [B, L, C] tokens for cross-attention (text or image embeddings).
      context_mask: [B, L] bool, True where a token is attended to.
      pooled: [B, P] vector added to the time embedding (SDXL's pooled text, CLIP image).
      time_ids: [B, K] numbers that are Fourier-embedded (SDXL's sizes and crops).
      guidance: [B] guidance scale, for guidance-distilled networks.
      image: [B, H, W, C] channels concatenated with the input (inpainting, upscaling).
    """

    label: Array | None = None
    tokens: Array | None = None
    context: Array | None = None
    context_mask: Array | None = None
    pooled: Array | None = None
    time_ids: Array | None = None
    guidance: Array | None = None
    image: Array | None = None


def from_batch(batch: Mapping[str, Array]) -> Conditioning:
    """The conditioning in a batch dict: its entries with the names of fields."""
    names = [f.name for f in fields(Conditioning)]
    return Conditioning(**{name: batch[name] for name in names if name in batch})


def null_like(cond: Conditioning, **nulls: Array | float) -> Conditioning:
    """``cond`` with the given fields replaced by null values, broadcast over the batch.

    Signals that are never dropped (an inpainting mask, a size) stay as they are.
    """
    replaced = {}
    for name, value in nulls.items():
        old = getattr(cond, name)
        if old is not None:
            replaced[name] = jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)
    return cond.replace(**replaced)


def concatenate(*conds: Conditioning) -> Conditioning:
    """Joins along the batch; all must hold the same fields."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conds)


def drop(cond: Conditioning, null: Conditioning, dropped: Array) -> Conditioning:
    """``null`` for the examples where dropped [B] is True, ``cond`` elsewhere."""

    def select(n, c):
        return jnp.where(dropped.reshape((-1,) + (1,) * (c.ndim - 1)), n, c)

    return jax.tree.map(select, null, cond)
