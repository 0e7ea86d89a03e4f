"""Guidance at some noise levels only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise, Estimate, Stateful, as_estimate
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.guidance.transform import remembering, require


def interval(
    guided: Denoise | Stateful,
    plain: Denoise | Stateful,
    low: Array | float = 0.0,
    high: Array | float = jnp.inf,
) -> Denoise | Stateful:
    """``guided`` where low <= sigma / alpha <= high; elsewhere ``plain``.

    Kynkäänniemi et al., 2024; low and high are () or [B]. For levels with leaves (), as samplers
    give, and one interval for all images, only one of the two is evaluated; what the other
    remembers stays as it is, but for its ``skip``.
    """
    require((low >= 0) & (low < high), f"expected 0 <= low < high, got low={low} and high={high}")
    (init_guided, inner, skip_guided), (init_plain, outer, skip_plain) = map(
        remembering, (guided, plain)
    )

    def within(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
        # low alpha <= sigma, which holds at alpha = 0 too.
        below = (high == jnp.inf) | (level.sigma <= high * level.alpha)
        inside = (low * level.alpha <= level.sigma) & below

        def guide(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
            estimate, after = inner(x, level, memory[0])
            return as_estimate(estimate), (after, skip_plain(memory[1]))

        def otherwise(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
            estimate, after = outer(x, level, memory[1])
            return as_estimate(estimate), (skip_guided(memory[0]), after)

        if jnp.ndim(inside) == 0:
            return jax.lax.cond(inside, guide, otherwise, x, level, memory)
        mask = inside.reshape((-1,) + (1,) * (x.ndim - 1))
        (first, one), (second, two) = guide(x, level, memory), otherwise(x, level, memory)

        def mix(a: Array, b: Array) -> Array:
            return jnp.where(mask, a, b) if jnp.shape(a) == x.shape else a

        # Both were evaluated, and each remembers; momentum, of each image by itself, is masked.
        after = (jax.tree.map(mix, one[0], two[0]), two[1])
        return jax.tree.map(mix, first, second), after

    if not isinstance(guided, Stateful) and not isinstance(plain, Stateful):
        return lambda x, level: within(x, level, (None, None))[0]
    return Stateful(
        lambda x: (init_guided(x), init_plain(x)),
        within,
        lambda memory: (skip_guided(memory[0]), skip_plain(memory[1])),
    )
