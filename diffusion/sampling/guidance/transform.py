"""Transforms of one denoiser: thresholds, a classifier's gradient, intervals; what all share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.denoiser import Denoise, Estimate, Stateful, as_estimate
from diffusion.levels import Array, NoiseLevel

Step = Callable[[Array, NoiseLevel, Any], tuple[Estimate, Any]]  # Stateful.step, with an Estimate
Scale = Array | float | Callable[[NoiseLevel], Array]  # (), [B], or a function of the level


def remembering(denoise: Denoise | Stateful) -> Stateful:
    """``denoise`` as a ``Stateful`` that gives an ``Estimate``; a plain one's memory is None."""
    init, inner, skip = (
        denoise
        if isinstance(denoise, Stateful)
        else Stateful(lambda x: None, lambda x, level, memory: (denoise(x, level), memory))
    )

    def step(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
        result, memory = inner(x, level, memory)
        return as_estimate(result, x), memory

    return Stateful(init, step, skip)


def lift(denoise: Denoise | Stateful, evaluate: Callable[..., Any]) -> Denoise | Stateful:
    """The denoiser whose evaluation is ``evaluate(step, x, level, memory) -> (Estimate, memory)``.

    ``step`` is the one of ``denoise``, with memory None if it is plain; so is then the result.
    """
    inner = remembering(denoise)
    if isinstance(denoise, Stateful):
        return inner._replace(step=partial(evaluate, inner.step))
    return lambda x, level: evaluate(inner.step, x, level, None)[0]


def on_estimate(
    denoise: Denoise | Stateful, change: Callable[[Array, NoiseLevel, Estimate], Estimate]
) -> Denoise | Stateful:
    """``denoise``, then change(x, level, estimate)."""

    def evaluate(step: Step, x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
        estimate, memory = step(x, level, memory)
        return change(x, level, estimate), memory

    return lift(denoise, evaluate)


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


def weight(scale: Scale, level: NoiseLevel, x: Array) -> Array:
    """The scale at this level, as ``per_image``."""
    return per_image(scale(level) if callable(scale) else scale, x)


def dot(a: Array, b: Array) -> Array:
    """[B]: each image's inner product of a and b, [B, ...]."""
    return (a * b).reshape(len(a), -1).sum(-1)


def require(holds: Any, message: str) -> None:
    """Raises ValueError with ``message`` where a condition on numbers does not hold.

    Traced values pass: what is an argument of a compiled function was checked when it was made.
    """
    if not isinstance(holds, jax.core.Tracer) and not np.all(holds):
        raise ValueError(message)


def clip(
    denoise: Denoise | Stateful, low: Array | float = -1.0, high: Array | float = 1.0
) -> Denoise | Stateful:
    """x_0_hat clipped to the data's range, () or [B] (DDPM, Ho et al., 2020)."""
    require(low < high, f"expected low < high, got low={low} and high={high}")
    return _thresholded(denoise, lambda x0: jnp.clip(x0, per_image(low, x0), per_image(high, x0)))


def dynamic_threshold(
    denoise: Denoise | Stateful, quantile: Array | float = 0.995, largest: Array | float = jnp.inf
) -> Denoise | Stateful:
    """x_0_hat clipped to [-s, s] and divided by s, so that it lies in [-1, 1].

    s is the quantile of |x_0_hat| over the image, but at least 1 and at most ``largest`` (Imagen,
    Saharia et al., 2022, section 2.3, which has no upper bound; diffusers' sample_max_value, 1 by
    default, at which this is ``clip``). For pixels, which lie in [-1, 1], not latents. Both numbers
    are () or [B].
    """
    require((quantile > 0) & (quantile <= 1), f"quantile must lie in (0, 1], got {quantile}")
    require(largest >= 1, f"largest must be at least 1, got {largest}")

    def threshold(x0_hat: Array) -> Array:
        size = jnp.abs(x0_hat).reshape(len(x0_hat), -1)
        share = jnp.broadcast_to(jnp.asarray(quantile, size.dtype), size.shape[:1])
        s = per_image(jnp.clip(jax.vmap(jnp.quantile)(size, share), 1.0, largest), x0_hat)
        return jnp.clip(x0_hat, -s, s) / s

    return _thresholded(denoise, threshold)


def _thresholded(
    denoise: Denoise | Stateful, threshold: Callable[[Array], Array]
) -> Denoise | Stateful:
    """``unclipped`` is what x_0_hat was before the first threshold."""

    def change(x: Array, level: NoiseLevel, e: Estimate) -> Estimate:
        unclipped = e.x0 if e.unclipped is None else e.unclipped
        return Estimate(threshold(e.x0), e.nu, unclipped)

    return on_estimate(denoise, change)


def classifier_guidance(
    denoise: Denoise | Stateful, log_prob: Callable[[Array, NoiseLevel], Array], scale: Scale = 1.0
) -> Denoise | Stateful:
    """D + scale (sigma^2 / alpha) grad_x log p(y | x_t) (Dhariwal & Nichol, 2021, alg. 2).

    There eps_hat moves by -scale sigma grad. With an unconditional denoiser, the true p(y | x_t)
    and scale 1 this is the conditional denoiser, for any schedule; where alpha = 0, x_t tells
    nothing about y and nothing changes. They found a conditional one better still. ``log_prob`` is
    (x_t [B, ...], level) -> each image's log-likelihood [B] of its own label (or anything).
    """

    def change(x: Array, level: NoiseLevel, estimate: Estimate) -> Estimate:
        gradient = jax.grad(lambda x: log_prob(x, level).sum())(x)
        return move(estimate, weight(scale, level, x) * score_to_x0(level, gradient))

    return on_estimate(denoise, change)


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
    inner, outer = remembering(guided), remembering(plain)

    def within(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
        # low alpha <= sigma, which holds at alpha = 0 too.
        below = (high == jnp.inf) | (level.sigma <= high * level.alpha)
        inside = (low * level.alpha <= level.sigma) & below

        def guide(memory: Any) -> tuple[Estimate, Any]:
            estimate, after = inner.step(x, level, memory[0])
            return estimate, (after, outer.skip(memory[1]))

        def otherwise(memory: Any) -> tuple[Estimate, Any]:
            estimate, after = outer.step(x, level, memory[1])
            return estimate, (inner.skip(memory[0]), after)

        if jnp.ndim(inside) == 0:
            return jax.lax.cond(inside, guide, otherwise, memory)
        mask = inside.reshape((-1,) + (1,) * (x.ndim - 1))
        (first, one), (second, two) = guide(memory), otherwise(memory)

        def mix(a: Array, b: Array) -> Array:
            return jnp.where(mask, a, b) if jnp.shape(a) == x.shape else a

        # Both were evaluated, and each remembers; momentum, of each image by itself, is masked.
        after = (jax.tree.map(mix, one[0], two[0]), two[1])
        return jax.tree.map(mix, first, second), after

    if not isinstance(guided, Stateful) and not isinstance(plain, Stateful):
        return lambda x, level: within(x, level, (None, None))[0]
    return Stateful(
        lambda x: (inner.init(x), outer.init(x)),
        within,
        lambda memory: (inner.skip(memory[0]), outer.skip(memory[1])),
    )
