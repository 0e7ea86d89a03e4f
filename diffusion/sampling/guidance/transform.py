"""What transforms of a denoiser share: memory and an estimate's other fields pass through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.denoiser import Denoise, Estimate, Stateful, as_estimate
from diffusion.levels import Array, NoiseLevel

Step = Callable[[Array, NoiseLevel, Any], tuple[Estimate, Any]]  # Stateful.step, with an Estimate


def lift(denoise: Denoise | Stateful, wrap: Callable[[Step], Step]) -> Denoise | Stateful:
    """``wrap`` applied to one evaluation (x, level, memory) -> (Estimate, memory).

    A ``Stateful`` denoiser gives a ``Stateful`` one, a plain one (memory None) a plain one.
    """
    if isinstance(denoise, Stateful):

        def remembered(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
            result, memory = denoise.step(x, level, memory)
            return as_estimate(result), memory

        return denoise._replace(step=wrap(remembered))
    step = wrap(lambda x, level, memory: (as_estimate(denoise(x, level)), memory))
    return lambda x, level: step(x, level, None)[0]


def remembering(denoise: Callable[..., Any] | Stateful) -> Stateful:
    """``denoise`` as a ``Stateful`` one; a plain one's memory is None."""
    if isinstance(denoise, Stateful):
        return denoise
    return Stateful(lambda x: None, lambda x, level, memory: (denoise(x, level), memory))


def move(estimate: Estimate, shift: Array) -> Estimate:
    """``estimate`` with ``shift`` [B, ...] added to x0, and to what x0 was before clipping."""
    unclipped = None if estimate.unclipped is None else estimate.unclipped + shift
    return estimate._replace(x0=estimate.x0 + shift, unclipped=unclipped)


def score_to_x0(level: NoiseLevel, gradient: Array) -> Array:
    """sigma^2 / alpha * gradient: how x_0_hat moves when the score moves by gradient [B, ...].

    By Tweedie, score = (alpha x_0_hat - x_t) / sigma^2. Where alpha = 0, x_t says nothing about
    x_0 and the answer is 0.
    """
    level = level.expand(gradient.ndim)
    alpha = jnp.asarray(level.alpha, gradient.dtype)
    some = alpha > 0
    factor = jnp.where(some, level.sigma**2 / jnp.where(some, alpha, 1), 0)
    return jnp.where(some, factor * gradient, 0).astype(gradient.dtype)


def per_image(values: Array | float, x: Array) -> Array:
    """() or [B] -> [1, ...] or [B, 1, ...] in x's dtype, for arithmetic with x [B, ...]."""
    values = jnp.asarray(values, x.dtype)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def dot(a: Array, b: Array) -> Array:
    """[B]: each image's inner product of a and b, [B, ...]."""
    return (a * b).reshape(len(a), -1).sum(-1)


def require(holds: Any, message: str) -> None:
    """Raises ValueError with ``message`` where a condition on numbers does not hold.

    Traced values pass: what is an argument of a compiled function was checked when it was made.
    """
    if not isinstance(holds, jax.core.Tracer) and not np.all(holds):
        raise ValueError(message)
