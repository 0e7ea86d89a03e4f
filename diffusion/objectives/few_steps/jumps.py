"""Moves between two noise levels: a jump along a straight line, and steps of a teacher's flow."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise
from diffusion.levels import Array, NoiseLevel

OdeStep = Callable[[Denoise, Array, NoiseLevel, NoiseLevel], Array]
"""(denoise, x [B, ...], now, after) -> x at the levels ``after``; leaves of both [B]."""


def jump(x: Array, d: Array, now: NoiseLevel, to: NoiseLevel) -> Array:
    """J(x, d; now -> to) = alpha_to d + (sigma_to / sigma_now) (x - alpha_now d).

    DDIM's step, and Euler's on every schedule. It is exact where d is what the trajectory itself
    keeps fixed: the network d(x, now, to) of a flow map, or at to = 0 a consistency function.
    """
    now, to = now.expand(x.ndim), to.expand(x.ndim)
    return to.alpha * d + to.sigma / now.sigma * (x - now.alpha * d)


def landing(x: Array, y: Array, now: NoiseLevel, to: NoiseLevel) -> Array:
    """The d whose ``jump`` from x at ``now`` arrives at y at ``to``, its inverse in d."""
    now, to = now.expand(x.ndim), to.expand(x.ndim)
    keep = to.sigma / now.sigma
    return (y - keep * x) / (to.alpha - keep * now.alpha)


def euler(denoise: Denoise, x: Array, now: NoiseLevel, after: NoiseLevel) -> Array:
    """The ``jump`` with d = E[x_0 | x] of a denoiser: Euler's step and DDIM's, of order 1."""
    return jump(x, denoise(x, now), now, after)


def heun(denoise: Denoise, x: Array, now: NoiseLevel, after: NoiseLevel) -> Array:
    """Heun's step for z = x / (alpha + sigma) over sigma / (alpha + sigma), dz = eps - D, order 2.

    A step to the clean data is Euler's, as in EDM.
    """
    first = euler(denoise, x, now, after)
    safe = where(after.sigma == 0, now, after)

    def slope(x: Array, level: NoiseLevel) -> Array:
        d, level = denoise(x, level), level.expand(x.ndim)
        return (x - (level.alpha + level.sigma) * d) / level.sigma

    mean = (slope(x, now) + slope(first, safe)) / 2
    now, after = now.expand(x.ndim), after.expand(x.ndim)
    total, total_after = now.alpha + now.sigma, after.alpha + after.sigma
    z = x / total + (after.sigma / total_after - now.sigma / total) * mean
    return jnp.where(after.sigma == 0, first, total_after * z)


def multistep(denoise: Denoise, x: Array, nodes: NoiseLevel, first: Array) -> Array:
    """DPM-Solver++ (2M) (Lu et al., 2022) from a node of each example to the last, clean one.

    A step is a ``jump`` by what the last two estimates extrapolate to, at its middle in log SNR.
    The first and the last are of order 1.

    Args:
      x: [B, ...] at the nodes ``first`` [B].
      nodes: leaves [K + 1, B], noisiest first.
    """
    count, index = len(nodes.t) - 1, jnp.arange(len(x))
    half = jnp.log(nodes.alpha / nodes.sigma)  # infinite at both ends, where that is the order 1

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, before = carry
        k = jnp.minimum(first + i, count - 1)
        now, after = (NoiseLevel(*(leaf[n, index] for leaf in nodes)) for n in (k, k + 1))
        d = denoise(x, now)
        h, h_before = (half[n + 1, index] - half[n, index] for n in (k, jnp.maximum(k - 1, 0)))
        ratio = h / h_before
        second = (i > 0) & jnp.isfinite(h) & jnp.isfinite(h_before)
        share = examples(jnp.where(second, ratio, 0) / 2, x.ndim)
        moved = jump(x, (1 + share) * d - share * before, now, after)
        active = examples(first + i < count, x.ndim)
        return jnp.where(active, moved, x), jnp.where(active, d, before)

    steps = count - jnp.min(first)
    return jax.lax.fori_loop(0, steps, step, (x, jnp.zeros_like(x)))[0]


def where(condition: Array, a: NoiseLevel, b: NoiseLevel) -> NoiseLevel:
    """The levels ``a`` where the condition [B] holds, ``b`` elsewhere."""
    return NoiseLevel(*(jnp.where(condition, *pair) for pair in zip(a, b)))


def examples(values: Array, ndim: int) -> Array:
    """[B] -> [B, 1, ...] with ndim axes."""
    return values.reshape(values.shape + (1,) * (ndim - 1))


SOLVERS = {"euler": euler, "heun": heun}
