"""Noise levels: the forward process at one time, and between two.

x_t = alpha x_0 + sigma eps,  eps ~ N(0, I)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def namespace(*values: Any) -> ModuleType:
    """``jax.numpy`` if any value is a JAX array, else NumPy."""
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


class NoiseLevel(NamedTuple):
    """One noise level, or a stack of them; leaves of shape (), [B] or [N + 1].

    Attributes:
      t: the schedule's own time, 0 = clean; of a shifted schedule the moved time, which is not what
        the schedule was called with: that is ``schedule.argument(level)``.
      alpha: signal scale.
      sigma: noise standard deviation.
    """

    t: Array
    alpha: Array
    sigma: Array

    @property
    def ratio(self) -> Array:
        """sigma / alpha, the noise level of EDM and k-diffusion; in [0, inf]."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> Array:
        """alpha^2 / sigma^2."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Array:
        """2 log(alpha / sigma)."""
        xp = namespace(self.alpha, self.sigma)
        return 2 * (xp.log(self.alpha) - xp.log(self.sigma))

    def expand(self, ndim: int) -> NoiseLevel:
        """Leaves [B] -> [B, 1, ...] and () -> [1, ...] with ndim axes, for arithmetic with x."""
        return NoiseLevel(*(a.reshape(a.shape + (1,) * (ndim - a.ndim)) for a in self))


def diffuse(x0: Array, noise: Array, level: NoiseLevel) -> Array:
    """x_t = alpha * x_0 + sigma * eps for x0, noise [B, ...] and level leaves () or [B]."""
    level = level.expand(x0.ndim)
    return level.alpha * x0 + level.sigma * noise


def posterior(now: NoiseLevel, before: NoiseLevel) -> tuple[Array, Array, Array, Array]:
    """q(x_s | x_t, x_0) = N(c_x x_t + c_x0 x_0, beta_tilde) for levels t (now) and s (before).

    Returns (beta, beta_tilde, c_x, c_x0), where beta is the variance of the step from s to t.
    """
    scale = now.alpha / before.alpha
    beta = now.sigma**2 - (scale * before.sigma) ** 2
    share = beta / now.sigma**2
    c_x = scale * before.sigma**2 / now.sigma**2
    return beta, before.sigma**2 * share, c_x, before.alpha * share
