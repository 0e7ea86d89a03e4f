"""Exponential moving averages of the parameters, ema <- beta ema + (1 - beta) params.

A profile is a function t -> beta of the number of updates so far, t = 1, 2, .... With the
power-function profile beta = (1 - 1/t)^(gamma + 1) the average after T updates is

    sum_t w_t params_t,   w_t proportional to t^gamma approximately,

an average whose width stays a fixed share sigma_rel of the run (EDM2, Karras et al., 2024, sec. 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.levels import Array

Profile = Callable[[Array], Array]  # number of updates, t >= 1 -> beta in [0, 1]

SIGMA_REL_MAX = 1 / np.sqrt(12)  # gamma = 0, the plain mean of all parameters so far


def constant(decay: float, ramp: bool = True) -> Profile:
    """beta = decay in [0, 1); with ``ramp``, min(decay, t / (9 + t)), so that the average
    forgets the initial parameters early in the run."""
    if not 0 <= decay < 1:
        raise ValueError(f"an EMA's decay must lie in [0, 1), got {decay}")

    def beta(t: Array) -> Array:
        t = jnp.asarray(t, jnp.float32)
        return jnp.minimum(decay, t / (9 + t)) if ramp else jnp.full_like(t, decay)

    return beta


def power_function(sigma_rel: float) -> Profile:
    """beta = (1 - 1/t)^(gamma + 1) with the gamma of width sigma_rel (EDM2, app. C)."""
    exponent = float(gamma_from_sigma_rel(sigma_rel)) + 1

    def beta(t: Array) -> Array:
        # (1 - 1/t)^e through log1p: float32's 1 - 1/t loses 1/t when t is large.
        t = jnp.maximum(jnp.asarray(t, jnp.float32), 1)
        return jnp.exp(exponent * jnp.log1p(-1 / t))

    return beta


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2, for 0 < sigma_rel <= 0.288."""
    if not 0 < sigma_rel <= SIGMA_REL_MAX:
        raise ValueError(f"sigma_rel must lie in (0, {SIGMA_REL_MAX:.3f}], got {sigma_rel}")
    s = float(sigma_rel) ** -2
    return max(np.roots([1, 7, 16 - s, 12 - s]).real.max(), 0.0)


def update(ema: Any, params: Any, beta: Array) -> Any:
    """beta ema + (1 - beta) params for two trees of the same structure."""
    return jax.tree.map(lambda e, p: e + (1 - beta).astype(e.dtype) * (p - e), ema, params)


CHOICES = {f.__name__: f for f in (constant, power_function)}
