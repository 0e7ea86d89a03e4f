"""Representation alignment (REPA; Yu et al., 2025, "Representation Alignment for Generation").

    loss += weight * E [ -mean_n cos(h_phi(f_n(x_t)), y_n(x_0)) ]

pulls the tokens f_n of an inner block of the denoiser, through a small projector h_phi, towards a
frozen encoder's features y_n of the clean image (eq. 8). Only training needs encoder and projector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.levels import Array

Params = Any
Encoder = Callable[[Params, Array, tuple[int, int]], Array]
"""(its parameters, images [B, H, W, C] in [-1, 1], grid) -> features [B, h, w, D]; grid is the
tokens' (h, w), which an encoder that can choose its resolution should meet."""


class Projector(nn.Module):
    """Three layers with SiLU between them: tokens [..., C] -> [..., features], float32."""

    features: int
    hidden: int = 2048

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.silu(nn.Dense(self.hidden)(x.astype(jnp.float32)))
        x = nn.silu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.features)(x)


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What is aligned with what.

    Attributes:
      encoder: of clean images; its parameters are ``frozen["encoder"]``.
      projector: of the tokens; its parameters are trained, as ``params["projector"]``.
      block: the denoiser's, as its ``features`` argument counts them.
      weight: of the loss; 0.5 in the paper.
      stop: steps after which it no longer counts nor costs anything (HASTE, Wang et al., 2025: it
        helps early and hinders late); None: it stays.
    """

    encoder: Encoder
    projector: nn.Module
    block: int
    weight: float = 0.5
    stop: int | None = None

    def init(self, key: Array, tokens: jax.ShapeDtypeStruct) -> Params:
        """The projector's initial parameters."""
        return self.projector.init(key, jnp.zeros(tokens.shape, tokens.dtype))["params"]

    def loss(
        self, params: Params, frozen: Params, tokens: Array, batch: Mapping[str, Array]
    ) -> tuple[Array, Array]:
        """The loss, weighted, and the mean cosine similarity.

        Args:
          params: the projector's.
          frozen: holds the encoder's.
          tokens: [B, h, w, C] of the denoiser.
          batch: its images are "clean" (latents have theirs there) or else "x"; from "step", the
            number of steps done before, on ``stop`` both results are 0.
        """

        def similarity(params: Params, tokens: Array) -> Array:
            images = batch.get("clean", batch["x"])
            features = self.encoder(frozen["encoder"], images, tokens.shape[1:3])
            features = jax.lax.stop_gradient(features).astype(jnp.float32)
            if features.shape[1:3] != tokens.shape[1:3]:
                shape = (len(features), *tokens.shape[1:3], features.shape[-1])
                features = jax.image.resize(features, shape, "linear")
            return cosine(self.projector.apply({"params": params}, tokens), features).mean()

        if self.stop is None or "step" not in batch:
            found = similarity(params, tokens)
        else:
            found = jax.lax.cond(
                batch["step"] < self.stop, similarity, lambda *_: jnp.zeros(()), params, tokens
            )
        return -self.weight * found, found


def cosine(a: Array, b: Array, eps: float = 1e-8) -> Array:
    """Cosine of the angle between vectors along the last axis; 0 where one is 0."""
    squares = jnp.square(a).sum(-1) * jnp.square(b).sum(-1)
    return (a * b).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, eps**2))
