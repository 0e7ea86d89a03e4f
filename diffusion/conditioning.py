"""All conditioning signals of a network in one batch-first structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from diffusion.levels import Array

Signals = TypeVar("Signals")  # a pytree


@flax.struct.dataclass
class Hint:
    """A picture that a ControlNet or a T2I-Adapter follows, and how strongly.

    Attributes:
      image: [B, H, W, C] in [0, 1], as large as the picture in pixels. None with ``features``.
      features: what a T2I-Adapter makes of the image, which it need not see at each step then.
      scale: [B, K] factors of the residuals, or [B, 1] of all; None: 1.
      first, last: [B] the c_noise between which the hint acts, both included; None: always. A scale
        of 0 leaves an example as it is, to the bit.
    """

    image: Array | None = None
    features: tuple[Array, ...] | None = None
    scale: Array | None = None
    first: Array | None = None
    last: Array | None = None


@flax.struct.dataclass
class ImagePrompt:
    """Pictures whose content or style is taken over by an IP-Adapter's own cross-attention.

    Attributes:
      tokens: [B, N, C] for the adapter's keys and values; None: the network makes them from
        ``features``.
      features: [B, ...] the image encoder's, for training.
      scale: [B, A] a factor for each of the network's cross-attentions, in the order down, up, mid,
        or [B, 1] for all; None: 1.
      mask: [B, h, w, 1] in [0, 1], the part of the picture where the prompt acts, or None.
    """

    tokens: Array | None = None
    features: Array | None = None
    scale: Array | None = None
    mask: Array | None = None


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
      span: [B] how far below its level a two-time network aims, in sigma / (alpha + sigma), from 0,
        the level itself, to 1.
      image: [B, H, W, C] channels concatenated with the input (inpainting, upscaling).
      hints: one for each ControlNet or T2I-Adapter around the network.
      image_prompts: one for each IP-Adapter around it.
    """

    label: Array | None = None
    tokens: Array | None = None
    context: Array | None = None
    context_mask: Array | None = None
    pooled: Array | None = None
    time_ids: Array | None = None
    guidance: Array | None = None
    span: Array | None = None
    image: Array | None = None
    hints: tuple[Hint, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()


def from_batch(batch: Mapping[str, Array]) -> Conditioning:
    """The conditioning in a batch dict: its entries with the names of fields.

    "hint" [B, H, W, C] becomes the one of ``hints``, "image_features" [B, ...] that of
    ``image_prompts``.
    """
    names = [f.name for f in fields(Conditioning)]
    cond = Conditioning(**{name: batch[name] for name in names if name in batch})
    if "hint" in batch:
        cond = cond.replace(hints=(Hint(batch["hint"]),))
    if "image_features" in batch:
        prompt = ImagePrompt(features=batch["image_features"])
        cond = cond.replace(image_prompts=(prompt,))
    return cond


def null_like(cond: Conditioning, **nulls: Array | float) -> Conditioning:
    """``cond`` with the given fields replaced by null values, broadcast over the batch.

    ``image_features`` stands for those of each of ``image_prompts``. Signals that are never dropped
    (an inpainting mask, a size) stay as they are.
    """

    def like(old: Array, value: Array | float) -> Array:
        return jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)

    if "image_features" in nulls:
        nulls = dict(nulls)
        value = nulls.pop("image_features")
        cond = cond.replace(
            image_prompts=tuple(
                p if p.features is None else p.replace(features=like(p.features, value))
                for p in cond.image_prompts
            )
        )
    present = {name: getattr(cond, name) for name in nulls}
    return cond.replace(
        **{name: like(old, nulls[name]) for name, old in present.items() if old is not None}
    )


def concatenate(*conds: Conditioning) -> Conditioning:
    """Joins along the batch; all must hold the same fields."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conds)


def drop(cond: Signals, null: Signals, dropped: Array) -> Signals:
    """``null`` for the examples where dropped [B] is True, ``cond`` elsewhere; whole, or a part."""

    def select(n, c):
        return jnp.where(dropped.reshape((-1,) + (1,) * (c.ndim - 1)), n, c)

    return jax.tree.map(select, null, cond)
