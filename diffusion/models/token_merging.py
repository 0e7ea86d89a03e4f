"""Token merging: self-attention over fewer tokens, without training (ToMe for Stable Diffusion).

Bolya & Hoffman, 2023. In each attention over an image's tokens, a quarter of them, one in each
2 x 2 square, are destinations. Those of the other tokens that are most similar to a destination are
averaged with it, and afterwards each receives its destination's result. Queries, keys and values
are merged after their projections. Since these are linear, this equals merging before and unmerging
after the whole attention layer, without its residual. Similarity is the cosine of the keys' mean
over the heads (Bolya et al., 2023, "Token merging", section 3); the paper compares the block's
input.

As in the paper, a merged token counts once in the softmax, whatever the number of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.levels import Array
from diffusion.models.attention import Attend, SpatialAttention, SpatialTransformer
from diffusion.models.surroundings import image_network
from diffusion.models.unet import UNet

MOST = 0.75
"""Largest share of the tokens that can be merged: all but the destinations."""


def check(network: nn.Module) -> None:
    """Raises ValueError if the network has no tokens that could be merged."""
    image = image_network(network)
    if not isinstance(image, UNet):
        raise ValueError(
            f"merge_tokens is for U-Nets; this is a {type(image).__name__}, whose tokens stay apart"
        )


def most_tokens(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Tokens of the largest map that a U-Net attends over, for examples of ``shape`` [H, W, C]."""
    levels = [level for kind, level in image_network(network).all_kinds() if kind != 0]
    return max(((shape[0] >> level) * (shape[1] >> level) for level in levels), default=0)


def with_merged_tokens(
    function: Callable[..., Any], ratio: float, least: int = 1024, key: jax.Array | None = None
) -> Callable[..., Any]:
    """``function`` with tokens merged in its networks' self-attention over images.

    Args:
      function: calls networks when it is called, as a denoiser does; not jitted by itself.
      ratio: share of the tokens that is merged away, in [0, 0.75]; 0 changes nothing.
      least: maps of fewer tokens stay as they are. Merging pays on the largest maps alone: the
        paper merges on a U-Net's finest level.
      key: chooses the destinations, for all images alike; without a key they are the squares'
        first corners, which the paper found worse.
    """
    if not 0 <= ratio <= MOST:
        raise ValueError(f"ratio must lie in [0, {MOST}], got {ratio}")
    if ratio == 0:
        return function
    sizes: list[tuple[int, int]] = []

    def merging(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, (SpatialAttention, SpatialTransformer)):
            sizes.append(args[0].shape[1:3])
            try:
                return call(*args, **kwargs)
            finally:
                sizes.pop()
        if not (isinstance(module, Attend) and module.to_itself and sizes):
            return call(*args, **kwargs)
        height, width = sizes[-1]
        if height * width < least or min(height, width) < 2:
            return call(*args, **kwargs)
        slots, count = match(args[1].mean(2), destinations(height, width, key), ratio)
        merged = merge(jnp.stack(args[:3], axis=2), slots, count)
        return unmerge(call(*(merged[:, :, i] for i in range(3))), slots)

    def changed(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(merging):
            return function(*args, **kwargs)

    return changed


def destinations(height: int, width: int, key: jax.Array | None = None) -> Array:
    """Numbers [(height // 2) (width // 2)] of tokens, one of each 2 x 2 square.

    ``key`` chooses them at random; without a key, they are the squares' first tokens. Tokens at odd
    borders belong to no square.
    """
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    first = (2 * rows * width + 2 * columns).reshape(-1)
    if key is None:
        return jnp.asarray(first)
    corners = jnp.array([0, 1, width, width + 1])
    return first + corners[jax.random.randint(key, first.shape, 0, 4)]


def match(metric: Array, chosen: Array, ratio: float) -> tuple[Array, int]:
    """The slot [B, L] in [0, M) of the merged token that each token becomes a part of, and M.

    This is bipartite soft matching: a share ``ratio`` of the L tokens, at most all others, is
    merged into the destinations ``chosen`` [N], the same for all images. Destination i has slot i.
    The cosines of ``metric`` [B, L, D] are the tokens' similarities.
    """
    length, count = metric.shape[1], len(chosen)
    others = length - count
    merged = min(int(length * ratio), others)
    metric = metric.astype(jnp.float32)
    norm = jnp.sqrt((metric**2).sum(-1, keepdims=True))
    metric = jax.lax.stop_gradient(metric / jnp.maximum(norm, 1e-12))
    free = jnp.ones(length, bool).at[chosen].set(False)
    sources = jnp.nonzero(free, size=others)[0]
    scores = jnp.einsum("bid,bjd->bij", metric[:, sources], metric[:, chosen])
    best, nearest = scores.max(-1), scores.argmax(-1)  # [B, L - N]
    order = jnp.argsort(-best, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    own = jnp.where(rank < merged, nearest, count + rank - merged)
    slots = jnp.zeros(metric.shape[:2], own.dtype).at[:, sources].set(own)
    return slots.at[:, chosen].set(jnp.arange(count, dtype=own.dtype)), length - merged


def merge(x: Array, slots: Array, count: int) -> Array:
    """[B, L, ...] -> [B, count, ...], the mean of the tokens of each slot."""
    weight = jax.vmap(lambda s: jnp.zeros(count).at[s].add(1))(slots)  # [B, count]
    wide = x.astype(jnp.float32)
    total = jax.vmap(lambda a, s: jnp.zeros((count, *a.shape[1:])).at[s].add(a))(wide, slots)
    weight = weight.reshape(weight.shape + (1,) * (x.ndim - 2))
    return (total / weight).astype(x.dtype)


def unmerge(x: Array, slots: Array) -> Array:
    """[B, M, ...] -> [B, L, ...]: each token receives the value of its slot."""
    return jax.vmap(lambda a, s: a[s])(x, slots)
