"""The trained IP-Adapter: attention to pictures beside a frozen text-to-image U-Net."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from diffusion.adapters.adapter import Params
from diffusion.errors import check_range
from diffusion.levels import Array
from diffusion.models.image_tokens import HEAD, EmbeddingTokens, Resampler
from diffusion.models.ip_adapter import ImagePrompted, cross_attentions
from diffusion.models.surroundings import image_network, surrounded
from diffusion.models.text_to_image import TextToImage
from diffusion.specs import unknown

KINDS, STARTS = ("embedding", "patches"), ("text", "zero")
SITE = re.compile(r"((?:image/|network/)*)((down|up|mid)_block.*/attn2)/to_k/kernel")


@dataclass(frozen=True)
class IPAdapter:
    """An ``Adapter``; ``ip_adapter`` describes the fields."""

    encoder: str
    features: int
    tokens: int = 4
    kind: str = "embedding"
    width: int = 768
    start: str = "text"

    @property
    def feature(self) -> tuple[int, ...]:
        """(D,) of a picture's embedding, or (0, D) of its patches, however many."""
        return (self.features,) if self.kind == "embedding" else (0, self.features)

    def projection(self, context: int) -> nn.Module:
        """The module that makes tokens as wide as the context."""
        if self.kind == "embedding":
            return EmbeddingTokens(self.tokens, context)
        return Resampler(self.tokens, context, self.width, self.width // HEAD)

    def context(self, network: nn.Module) -> int:
        """The width of the context of a network.

        Raises:
          ValueError: it is no U-Net with cross-attention, or does not know this width.
        """
        cross_attentions(network)
        known = image_network(network).context_width
        known = network.text.width if not known and isinstance(network, TextToImage) else known
        if not known:
            raise ValueError("context_width=None: an IP-Adapter needs the width of the context")
        return known

    def network(self, network: nn.Module) -> nn.Module:
        """With attention to pictures around its U-Net; errors are those of ``context``."""
        projection = self.projection(self.context(network))
        return surrounded(network, lambda inner: ImagePrompted(inner, projection))

    def init(self, key: Array, base: Params) -> Params:
        """Keys and values from the text's, or zero values; a random projection.

        With the values zero the network computes what it did before. With the text's, which is how
        the published adapters were trained, it does not: scale 0 does.
        """
        flat, own = flatten_dict(base, sep="/"), {}
        found = sorted(filter(None, map(SITE.fullmatch, flat)), key=_order)
        for i, path in enumerate(match[0] for match in found):
            k, v = flat[path], flat[path.replace("to_k", "to_v")]
            v = v if self.start == "text" else jnp.zeros_like(v)
            own |= {f"to_k_ip_{i}": {"kernel": k}, f"to_v_ip_{i}": {"kernel": v}}
        own = jax.tree.map(lambda a: a.astype(jnp.float32), own)
        features = jnp.zeros((1, *(side or 1 for side in self.feature)))
        projection = self.projection(k.shape[0]).init(key, features)["params"]
        return {"projection": projection, **own}

    def merge(self, base: Params, params: Params) -> Params:
        """The base's parameters, and the adapter's around those of the U-Net."""
        if "text" in base:
            return {**base, "image": {"network": base["image"], **params}}
        return {"network": base, **params}


def ip_adapter(
    encoder: str,
    features: int,
    tokens: int = 4,
    kind: str = "embedding",
    width: int = 768,
    start: str = "text",
) -> IPAdapter:
    """Trains attention to pictures: keys and values of every cross-attention, and a projection.

    Batches hold the encoder's features of the pictures as ``image_features``.

    Args:
      encoder: of the pictures, when the adapter is drawn with: see
        ``pipelines.image_encoders.open_encoder``.
      features: D of its features.
      tokens: that a picture becomes.
      kind: "embedding" of features [D] (the first IP-Adapter), "patches" of [N, D] (Plus).
      width: of the latents of "patches", a multiple of 64.
      start: of the values: "text", a copy of the text's, or "zero".

    Raises:
      ValueError: an option is out of its range.
    """
    for name, value, valid in (("kind", kind, KINDS), ("start", start, STARTS)):
        if value not in valid:
            raise unknown(f"ip_adapter({name})", value, valid)
    check_range("features", features, 1)
    check_range("tokens", tokens, 1, 1024)
    check_range("width", width, HEAD, 64 * HEAD)
    if width % HEAD:
        raise ValueError(f"width={width} must be a multiple of {HEAD}")
    return IPAdapter(encoder, features, tokens, kind, width, start)


def _order(found: re.Match) -> tuple[Any, ...]:
    """Down, up, mid, each by its numbers."""
    part = ("down", "up", "mid").index(found[3])
    return (part, *map(int, re.findall(r"_(\d+)", found[2])))
