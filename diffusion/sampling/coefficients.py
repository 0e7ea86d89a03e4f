"""Learned few-step solvers: tables whose times and weights are free (``student`` learns them).

A sampler's table is an argument of ``sample``, so the distance of its samples to a teacher's, from
the same initial noise, can be differentiated in every number of it. Free here are the times t_i
and, in each step, the weights of the current and the K - 1 earlier estimates:

    x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) sum_j w_j D_{i-j},     sum_j w_j = 1.

DDIM (w = 1), DPM-Solver++ 2M and 3M are members of this family. Every member is exact where D does
not change, so that it reproduces a point mass exactly. Close relatives are non-stationary bespoke
solvers (Shaul et al., 2024), S4S (Frankel et al., 2025) and, for the times alone, LD3 (Tong et al.,
2024).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.tables import REGISTERS, Solver
from diffusion.schedules import Schedule


class Coefficients(NamedTuple):
    """The free numbers of a table."""

    log_steps: Array  # [N] logarithms of the steps in time, up to a common factor
    earlier: Array  # [N, K - 1] weights of the earlier estimates, newest first


def coefficients(solver: Solver, t_end: float = 0.0, memory: int = 4) -> Coefficients:
    """The coefficients of a multistep solver in data prediction (DDIM, DPM-Solver++ 2M or 3M).

    Args:
      solver: its table; one of another form, or that draws noise, is refused.
      t_end: the grid's last time.
      memory: K, the number of estimates that a step combines, 1 to 6.
    """
    times = np.append(solver.level.t, t_end)
    if np.any(solver.noise) or np.any(np.diff(times) >= 0) or not 1 <= memory <= REGISTERS:
        raise ValueError(
            "learning starts from a deterministic solver with one evaluation a step, and memory in "
            f"1..{REGISTERS}; got a solver with noise or stages, or memory={memory}"
        )
    b = solver.b[:, 0] + solver.b_raw[:, 0]
    gain = b + solver.A[:, 0, 1:].sum(axis=1)
    remembers = np.all(solver.b[:-1, 1] == 1) or not np.any(solver.A[:, 0, 1:])
    if not remembers or np.any(gain == 0):
        raise ValueError(
            "learning starts from a table that combines estimates of x_0: ddim, dpmpp_2m, dpmpp_3m"
        )
    earlier = (solver.A[:, 0, 1:] / gain[:, None])[:, : memory - 1]
    return Coefficients(np.log(-np.diff(times)), earlier)


def build(learned: Coefficients, schedule: Schedule, t_start: float, t_end: float = 0.0) -> Solver:
    """The table with these coefficients, from t_start to t_end; traceable and differentiable."""
    fractions = jnp.cumsum(jax.nn.softmax(learned.log_steps))[:-1]
    times = t_start + (t_end - t_start) * fractions
    levels = schedule(jnp.concatenate([jnp.array([t_start]), times, jnp.array([t_end])]))
    now, after = (NoiseLevel(*(a[part] for a in levels)) for part in (slice(-1), slice(1, None)))
    keep = after.sigma / now.sigma
    gain = after.alpha - now.alpha * keep
    rows, k = learned.earlier.shape
    # A weight of an estimate that does not exist yet goes to the current one.
    exists = jnp.arange(rows)[:, None] > jnp.arange(k)[None]
    earlier = jnp.where(exists, learned.earlier, 0.0)
    A = jnp.zeros((rows, REGISTERS, REGISTERS))
    A = A.at[:, 0, 0].set(keep).at[:, 0, 1 : k + 1].set(gain[:, None] * earlier)
    for j in range(1, k):
        A = A.at[:, j + 1, j].set(1.0)  # the registers y_1, y_2, ... hold the earlier estimates
    b = jnp.zeros((rows, REGISTERS)).at[:, 0].set(gain * (1 - earlier.sum(axis=1)))
    b = b.at[:, 1].set(1.0 if k else 0.0)
    nothing = jnp.zeros_like(b)
    init = jnp.hypot(now.alpha[0], now.sigma[0])
    return Solver(now, A, b, nothing, nothing, nothing, init)
