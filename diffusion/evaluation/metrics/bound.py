"""The variational bound on the negative log-likelihood (DDPM, Ho et al., 2020, eq. 5).

    -log p(x_0) <= KL(q(x_T | x_0) || N(0, I)) + sum_t KL(q(x_s | x_t, x_0) || p(x_s | x_t))
                   - log p(x_0 | x_1)

The chain's steps are those of a grid, so that any schedule and number of steps has a bound: with
the posterior's variance each term is (SNR(s) - SNR(t)) |x_0 - D|^2 / 2 (VDM, Kingma et al., 2021,
eq. 14).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.denoiser import Denoise, as_estimate
from diffusion.levels import Array, NoiseLevel, diffuse, posterior
from diffusion.objectives.terms.variance import reverse_step, step_bits


class Bound(NamedTuple):
    """Three parts, each [B] in bits per dimension."""

    prior: Array  # L_T, of x_T against the samplers' initial noise
    steps: Array  # the sum of the KL divergences
    decoder: Array  # -log p(x_0 | x_1)

    @property
    def total(self) -> Array:
        return self.prior + self.steps + self.decoder


def variational_bound(
    denoise: Denoise,
    grid: NoiseLevel,
    x0: Array,
    keys: jax.Array,
    *,
    levels: int | None = None,
    nu: float = 0.0,
    draws: int | None = None,
) -> Bound:
    """The bound on -log p(x_0) of each example, in bits per dimension; traceable.

    If the denoiser gives nu, the reverse step's variance is the learned one. Otherwise nu = 0 takes
    the posterior's variance, right for data that are points at this noise level, and nu = 1 the
    forward step's, right for data that are smooth at it; the last step, from sigma_1, always takes
    the forward step's. With nu = 0, on smooth data, the bound becomes tight only with finer steps
    of log SNR, not with more steps evenly spaced in sigma.

    Image i's noise, and its steps, come from ``keys[i]`` alone.

    Args:
      denoise: (x [B, ...], level with leaves [B]) -> x_0_hat or an ``Estimate``.
      grid: N + 1 levels, noisiest first, ending at (1, 0); float64 NumPy.
      x0: [B, ...].
      keys: [B] typed keys.
      levels: number of grey levels of x0, evenly spaced in [-1, 1]; the bound is then one on their
        probability. None: one on the density of continuous data.
      nu: in [0, 1], the position of log-variances that are not learned.
      draws: number of the N - 1 steps before the last that are evaluated, one at random in each of
        as many equal ranges; unbiased. None: all.
    """
    count = len(grid.sigma) - 1
    if grid.sigma[-1] != 0 or count < 2:
        raise ValueError(
            f"the bound needs a grid of at least two steps that ends at sigma = 0, got {count} "
            f"that end at {grid.sigma[-1]}"
        )
    if not 0 <= nu <= 1:
        raise ValueError(f"nu must lie in [0, 1], got {nu}")
    if draws is not None and not 1 <= draws <= count - 1:
        raise ValueError(f"draws must lie in 1..{count - 1}, got {draws}")
    dtype = jnp.result_type(float)
    x0 = jnp.asarray(x0, dtype)
    now, before = (NoiseLevel(*(leaf[part] for leaf in grid)) for part in (np.s_[:-1], np.s_[1:]))
    last = np.arange(count) == count - 1
    floor = posterior(*(NoiseLevel(*(leaf[k] for leaf in grid)) for k in (-3, -2)))[1]
    table = reverse_step(now, before, last, np.where(last, floor, 0.0))
    table, now = jax.tree.map(lambda a: jnp.asarray(a, bool if a is last else dtype), (table, now))

    def term(index: Array) -> Array:  # index [B]
        level, step = jax.tree.map(lambda a: a[index], (now, table))
        folded = jax.vmap(jax.random.fold_in)(keys, index)
        flat = jax.vmap(lambda key: jax.random.normal(key, (x0[0].size,), dtype))(folded)
        x_t = diffuse(x0, flat.reshape(x0.shape), level)
        estimate = as_estimate(denoise(x_t, level), x_t)
        between = estimate.nu
        if between is None:
            between = jnp.where(step.last, 1.0, nu).reshape((-1,) + (1,) * (x0.ndim - 1))
        return step_bits(step, x0, x_t, estimate.x0.astype(dtype), between, levels)

    ranges = count - 1 if draws is None else draws
    index = jnp.broadcast_to(jnp.arange(ranges)[:, None], (ranges, len(x0)))
    if draws is not None:
        folds = jax.vmap(lambda key: jax.random.fold_in(key, 2**31))(keys)
        u = jax.vmap(lambda key: jax.random.uniform(key, (draws,), dtype))(folds)
        position = (index + u.T) * ((count - 1) / draws)
        index = jnp.minimum(position.astype(jnp.int32), count - 2)
    index = jnp.concatenate([index, jnp.full((1, len(x0)), count - 1)])
    terms = jax.lax.map(term, index)
    return Bound(_prior(x0, grid), terms[:-1].sum(0) * ((count - 1) / ranges), terms[-1])


def _prior(x0: Array, grid: NoiseLevel) -> Array:
    """KL(N(alpha x_0, sigma^2) || N(0, alpha^2 + sigma^2)), the latter as samplers start."""
    alpha, sigma = float(grid.alpha[0]), float(grid.sigma[0])
    share = sigma**2 / (alpha**2 + sigma**2)
    signal = alpha**2 / (alpha**2 + sigma**2)
    kl = 0.5 * (share + signal * x0**2 - 1 - math.log(share))
    return kl.reshape(len(x0), -1).mean(1) / math.log(2)
