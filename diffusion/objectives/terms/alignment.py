"""Representation alignment (REPA; Yu et al., 2025, "Representation Alignment for Generation").

    loss += weight * E [ -mean_n cos(h_phi(f_n(x_t)), y_n(x_0)) ]

pulls the tokens f_n of an inner block of the denoiser, through a small projector h_phi, towards a
frozen encoder's features y_n of the clean image (eq. 8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.objectives.objective import Batch, Context, Measured, Params
from diffusion.objectives.terms.term import Noised

Encoder = Callable[[Params, Array, tuple[int, int]], Array]
"""(parameters, images [B, H, W, C] in [-1, 1], the tokens' (h, w)) -> features [B, h, w, D]."""


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
    """The term, which acts in training alone.

    Attributes:
      encoder: of clean images; its parameters are ``frozen["alignment"]``.
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
    name: ClassVar[str] = "alignment"

    @property
    def blocks(self) -> tuple[int, ...]:
        """The one block whose tokens are aligned."""
        return (self.block,)

    def init(self, key: Array, noised: Noised) -> Params:
        """The projector's initial parameters."""
        tokens = noised.tokens[self.block]
        return self.projector.init(key, jnp.zeros(tokens.shape, tokens.dtype))["params"]

    def __call__(self, loss: Array, params: Params, context: Context, noised: Noised) -> Measured:
        """The loss less the weighted similarity of each example, and the mean similarity."""
        if not context.train:
            return loss, {}
        args = params, noised.tokens[self.block], noised.batch, context.frozen
        if self.stop is None:
            found = self.similarity(*args)
        else:
            found = jax.lax.cond(
                context.step < self.stop, self.similarity, lambda *_: jnp.zeros(loss.shape), *args
            )
        return loss - self.weight * found, {"alignment": found.mean()}

    def similarity(self, params: Params, tokens: Array, batch: Batch, frozen: Any) -> Array:
        """The mean cosine between projected tokens [B, h, w, C] and features, per example [B].

        The images are batch["clean"] (latents have theirs there) or else batch["x"].
        """
        images = batch.get("clean", batch["x"])
        features = self.encoder(frozen[self.name], images, tokens.shape[1:3])
        features = jax.lax.stop_gradient(features).astype(jnp.float32)
        if features.shape[1:3] != tokens.shape[1:3]:
            shape = (len(features), *tokens.shape[1:3], features.shape[-1])
            features = jax.image.resize(features, shape, "linear")
        return cosine(self.projector.apply({"params": params}, tokens), features).mean((1, 2))


def cosine(a: Array, b: Array, eps: float = 1e-8) -> Array:
    """Cosine of the angle between vectors along the last axis; 0 where one is 0."""
    squares = jnp.square(a).sum(-1) * jnp.square(b).sum(-1)
    return (a * b).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, eps**2))
