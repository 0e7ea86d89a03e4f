"""Where the rows of a table go, for networks that want to know: flow maps and their relatives."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.denoiser import ConditionalDenoise, Estimate
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.tables import Solver


def aims(solver: Solver) -> tuple[Array, Array]:
    """(times [R] of the rows, sigma / (alpha + sigma) [R] of the levels they go to).

    A row x' = a x + b D + c z goes, apart from its noise, to the level (b + a alpha, a sigma): that
    of the next node for DDIM and Euler, the clean data for consistency models' multistep sampling,
    and the level from which TCD goes up again.

    Raises:
      ValueError: rows combine several estimates, so that none of them goes anywhere by itself.
    """
    A, level = np.asarray(solver.A), solver.level
    if np.any(A[:, 0, 1:]):
        raise ValueError(
            "a network that is told where it aims needs a solver of one evaluation a step without "
            "memory: euler, ddim, consistency, lcm or tcd"
        )
    keep = A[:, 0, 0]
    sigma = keep * level.sigma
    alpha = solver.b[:, 0] + solver.b_raw[:, 0] + keep * level.alpha
    return np.float32(level.t), np.float32(sigma / (alpha + sigma))


def aimed(denoise: ConditionalDenoise, times: Array, shares: Array) -> ConditionalDenoise:
    """The denoiser of a two-time network, each of whose calls aims where its row of ``aims`` goes.

    It is called with levels of leaves (), those of the table.
    """

    def towards(x: Array, level: NoiseLevel, cond: Conditioning) -> Array | Estimate:
        row = jnp.argmin(jnp.abs(times - level.t))
        span = level.sigma / (level.alpha + level.sigma) - jnp.asarray(shares)[row]
        return denoise(x, level, cond.replace(span=jnp.full(len(x), span)))

    return towards
