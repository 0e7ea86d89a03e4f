"""From a network to E[x_0 | x_t], the one interface of samplers, guidance and distillation.

A ``Denoise`` is a function ``(x [B, ...], NoiseLevel with leaves () or [B]) -> x_0_hat [B, ...]``;
a ``ConditionalDenoise`` takes a third argument, the conditioning. A network that also learned its
reverse variances (Nichol & Dhariwal, 2021) gives the pair ``(x_0_hat, nu)``, where nu in [0, 1]
places each log-variance between its lower and its upper bound.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from diffusion.conditioning import Conditioning
from diffusion.levels import Array, NoiseLevel
from diffusion.predictions import Prediction, precondition

Estimate = Array | tuple[Array, Array]
Denoise = Callable[[Array, NoiseLevel], Estimate]
ConditionalDenoise = Callable[[Array, NoiseLevel, Conditioning], Estimate]
Network = Callable[[Array, Array, Conditioning], Array]  # (c_in x, c_noise [B], cond) -> F


def ddpm_index(level: NoiseLevel, steps: int = 1000) -> Array:
    """steps * t - 1: the table index 0..steps-1 (DDPM, ADM, DiT, Stable Diffusion)."""
    return steps * level.t - 1


def thousand_t(level: NoiseLevel) -> Array:
    """1000 t (rectified flows: SiT, SD3, FLUX)."""
    return 1000 * level.t


def log_sigma(level: NoiseLevel) -> Array:
    """log(sigma / alpha) / 4 (EDM)."""
    return jnp.log(level.ratio) / 4


def denoiser(
    network: Network,
    prediction: Prediction,
    c_noise: Callable[[NoiseLevel], Array],
) -> ConditionalDenoise:
    """x_0_hat = c_skip x + c_out F(c_in x, c_noise, cond).

    Where the network gives twice as many channels as x has, the second half is read as learned
    variances, in [-1, 1], and the result is the pair (x_0_hat, nu) with nu in [0, 1].
    """

    def denoise(x: Array, level: NoiseLevel, cond: Conditioning) -> Estimate:
        c = precondition(prediction, level.expand(x.ndim))
        noise = jnp.broadcast_to(c_noise(level), x.shape[:1])
        output = network(c.c_in * x, noise, cond).astype(x.dtype)
        if output.shape[-1] == x.shape[-1]:
            return c.c_skip * x + c.c_out * output
        output, variance = jnp.split(output, 2, axis=-1)
        return c.c_skip * x + c.c_out * output, jnp.clip((variance + 1) / 2, 0, 1)

    return denoise
