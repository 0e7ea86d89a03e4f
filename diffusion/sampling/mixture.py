"""The exact denoiser E[x_0 | x_t] of a mixture of normal distributions.

It is what a perfect network computes, at any noise level; samplers are tested and shown on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.denoiser import Denoise
from diffusion.levels import Array, NoiseLevel


def gaussian_mixture(
    means: Array | Sequence,
    stds: Array | Sequence[float] | float = 0.0,
    weights: Array | Sequence[float] | None = None,
) -> Denoise:
    """E[x_0 | x_t] for x_0 ~ sum_k w_k N(mu_k, s_k^2 I).

    Under component k, x_t ~ N(alpha mu_k, v_k I) with v_k = alpha^2 s_k^2 + sigma^2, so

        E[x_0 | x_t] = sum_k r_k (mu_k + (alpha s_k^2 / v_k) (x_t - alpha mu_k)),

    where r_k is proportional to w_k N(x_t; alpha mu_k, v_k I).

    Args:
      means: [K, ...] with x's shape after the first axis.
      stds: [K] >= 0, or one for all components; 0 for points.
      weights: [K], positive; they need not sum to 1. By default equal.
    """
    means = np.asarray(means)
    count = len(means)
    stds = np.broadcast_to(np.asarray(stds, np.float64), (count,))
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (count,):
        raise ValueError(f"expected {count} weights, one per mean, got shape {weights.shape}")
    if np.any(stds < 0) or np.any(weights <= 0):
        raise ValueError(f"stds must be >= 0 and weights > 0, got {stds} and {weights}")

    def denoise(x: Array, level: NoiseLevel) -> Array:
        mu = jnp.asarray(means.reshape(1, count, -1), x.dtype)  # [1, K, d]
        variance = jnp.asarray(stds**2, x.dtype)
        flat = x.reshape(len(x), 1, -1)  # [B, 1, d]
        _, alpha, sigma = level.expand(2)  # [B or 1, 1]
        v = alpha**2 * variance + sigma**2  # [B or 1, K]
        error = flat - alpha[..., None] * mu  # [B, K, d]
        log_w = jnp.asarray(np.log(weights), x.dtype) - 0.5 * flat.shape[-1] * jnp.log(v)
        r = jax.nn.softmax(log_w - 0.5 * (error**2).sum(-1) / v, axis=-1)  # [B, K]
        mean = mu + (alpha * variance / v)[..., None] * error
        return (r[..., None] * mean).sum(1).reshape(x.shape)

    return denoise
