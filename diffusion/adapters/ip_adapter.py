"""The trained IP-Adapter: keys and values of pictures beside a frozen text-to-image U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.adapters.adapter import Params
from diffusion.errors import check_range
from diffusion.models.image_tokens import HEAD, EmbeddingTokens, Resampler
from diffusion.models.ip_adapter import ImagePrompted, cross_attentions
from diffusion.models.text_to_image import image_path, surrounded, surrounded_params
from diffusion.specs import unknown

STARTS = ("text", "zero")


@dataclass(frozen=True)
class IPAdapter:
    """An ``Adapter`` for one network; ``ip_adapter`` makes it.

    Attributes:
      around: the network with the adapter around its U-Net.
      base: the network alone.
      projection: module of ``image_tokens``.
      feature: shape of what is known of one picture.
      start: "text" or "zero".
    """

    base: nn.Module
    projection: nn.Module
    feature: tuple[int, ...]
    start: str
