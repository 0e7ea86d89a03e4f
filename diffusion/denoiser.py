"""From a network to E[x_0 | x_t], the one interface of samplers, guidance and distillation.

A ``Denoise`` is a function ``(x [B, ...], NoiseLevel with leaves () or [B]) -> x_0_hat [B, ...]``;
a ``ConditionalDenoise`` takes a third argument, the conditioning. A denoiser that knows more than
x_0_hat (learned variances, x_0_hat before clipping) returns an ``Estimate``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion.conditioning import Conditioning
from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.predictions import Prediction, precondition
from diffusion.schedules import Schedule


class Estimate(NamedTuple):
    """E[x_0 | x_t], and optionally learned variances and the estimate before clipping.

    Attributes:
      x0: [B, ...].
      nu: [B, ...] in [0, 1], the place of each log-variance of the reverse step between its lower
        and its upper bound (Nichol & Dhariwal, 2021); None if variances were not learned.
      unclipped: [B, ...] x0 before it was clipped or thresholded; None if it was not.
    """

    x0: Array
    nu: Array | None = None
    unclipped: Array | None = None


Denoise = Callable[[Array, NoiseLevel], Array | Estimate]


class Stateful(NamedTuple):
    """A denoiser that remembers earlier evaluations; ``sample`` takes it as it takes a ``Denoise``.

    Attributes:
      init: x [B, ...] -> the memory before the first evaluation, a pytree.
      step: (x, level, memory) -> (x_0_hat or Estimate, memory).
      skip: memory -> memory, at an evaluation that another denoiser makes.
    """

    init: Callable[[Array], Any]
    step: Callable[[Array, NoiseLevel, Any], tuple[Array | Estimate, Any]]
    skip: Callable[[Any], Any] = lambda memory: memory


ConditionalDenoise = Callable[[Array, NoiseLevel, Conditioning], Array | Estimate]
Network = Callable[[Array, Array, Conditioning], Array]  # (c_in x, c_noise [B], cond) -> F


def as_estimate(result: Array | Estimate, x: Array | None = None) -> Estimate:
    """A denoiser's result as an ``Estimate``; ValueError if its shape is not that of ``x``."""
    estimate = result if isinstance(result, Estimate) else Estimate(result)
    for name, leaf in zip(estimate._fields, estimate) if x is not None else ():
        if leaf is not None and jnp.shape(leaf) != x.shape:
            raise ValueError(
                f"a denoiser's estimate must have the shape of its input, {x.shape}, got "
                f"{jnp.shape(leaf)} ({name})"
            )
    return estimate


def ddpm_index(level: NoiseLevel, steps: int = 1000) -> Array:
    """steps * t - 1: the table index 0..steps-1 (DDPM, ADM, DiT, Stable Diffusion); steps >= 1."""
    check_range("steps", steps, 1)
    return steps * level.t - 1


def thousand_t(level: NoiseLevel) -> Array:
    """1000 t (rectified flows: SiT, SD3, FLUX)."""
    return 1000 * level.t


def log_sigma(level: NoiseLevel) -> Array:
    """log(sigma / alpha) / 4 (EDM)."""
    return jnp.log(level.ratio) / 4


def denoiser(
    network: Network, prediction: Prediction, c_noise: Callable[[NoiseLevel], Array]
) -> ConditionalDenoise:
    """x_0_hat = c_skip x + c_out F(c_in x, c_noise, cond).

    If the network's output has twice as many channels as x, the second half holds learned
    variances, in [-1, 1], and the result is an ``Estimate`` with nu in [0, 1].
    """

    def denoise(x: Array, level: NoiseLevel, cond: Conditioning) -> Array | Estimate:
        c = precondition(prediction, level.expand(x.ndim))
        noise = jnp.broadcast_to(c_noise(level), x.shape[:1])
        output = network(c.c_in * x, noise, cond).astype(x.dtype)
        if output.shape[-1] == x.shape[-1]:
            return c.c_skip * x + c.c_out * output
        output, variance = jnp.split(output, 2, axis=-1)
        return Estimate(c.c_skip * x + c.c_out * output, jnp.clip((variance + 1) / 2, 0, 1))

    return denoise


def on_schedule(schedule: Schedule, x: Array, level: NoiseLevel) -> tuple[Array, NoiseLevel]:
    """The noised example and its level on another schedule, at the same sigma / alpha.

    x [B, ...] is multiplied by sqrt((alpha'^2 + sigma'^2) / (alpha^2 + sigma^2)). Levels beyond
    ``schedule.t_max`` become the one at t_max.
    """
    t = jnp.minimum(schedule.invert(level.alpha, level.sigma), schedule.t_max)
    other = schedule(t)
    factor = jnp.hypot(other.alpha, other.sigma) / jnp.hypot(level.alpha, level.sigma)
    return factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim)).astype(x.dtype) * x, other


C_NOISE = {f.__name__: f for f in (ddpm_index, thousand_t, log_sigma)}
