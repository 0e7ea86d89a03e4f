"""Learned uncertainty of the loss at each noise level (EDM2, Karras et al., 2024, eq. 21).

    loss <- exp(-u(level)) loss + u(level)

is least at u = log E[loss], so that every level then counts alike, whatever its scale.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.objective import Context, Measured, Params
from diffusion.objectives.terms.term import Noised


class LogVariance(nn.Module):
    """u(level), [B]: fixed random Fourier features of log(sigma / alpha) / 4 and one linear layer,
    zero at first."""

    features: int = 128

    @nn.compact
    def __call__(self, level: NoiseLevel) -> Array:
        frequency, phase = jax.random.uniform(jax.random.key(0), (2, self.features))
        # Clipped, since the ratio is infinite where alpha = 0.
        position = jnp.clip(jnp.log(level.ratio) / 4, -5.0, 5.0)
        angles = 2 * jnp.pi * (position[:, None] * (4 * frequency - 2)[None] + phase[None])
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(jnp.cos(angles))[:, 0]


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """The term; ``features`` is the number of Fourier features."""

    features: int = 128
    name: ClassVar[str] = "uncertainty"
    blocks: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        check_range("features", self.features, 1, 100_000)

    def init(self, key: Array, noised: Noised) -> Params:
        """The parameters of ``LogVariance``."""
        level = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), noised.level)
        return LogVariance(self.features).init(key, level)["params"]

    def __call__(self, loss: Array, params: Params, context: Context, noised: Noised) -> Measured:
        """The loss of each example, weighted."""
        u = self.log_variance(params, noised.level)
        return loss * jnp.exp(-u) + u, {}

    def log_variance(self, params: Params, level: NoiseLevel) -> Array:
        """u at levels with leaves [B]."""
        return LogVariance(self.features).apply({"params": params}, level)
