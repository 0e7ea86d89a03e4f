"""Distances between network output and target: [B, ...] x [B, ...] -> [B], per element."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array

Distance = Callable[[Array, Array], Array]


def _mean(x: Array) -> Array:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def l2(output: Array, target: Array) -> Array:
    """Mean squared error."""
    return _mean((output - target) ** 2)


def l1(output: Array, target: Array) -> Array:
    """Mean absolute error. Its optimum is the median, not E[x_0 | x]."""
    return _mean(jnp.abs(output - target))


def pseudo_huber(output: Array, target: Array, c: float = 0.03) -> Array:
    """sqrt(m + c^2) - c of the mean squared error m (Song & Dhariwal, 2023, whose c is sqrt(d) ours
    on the norm): m / 2c for small errors, the root mean square for large ones. c > 0."""
    check_range("c", c, 0, above=True)
    return jnp.sqrt(_mean((output - target) ** 2) + c**2) - c


CHOICES = {f.__name__: f for f in (l2, l1, pseudo_huber)}
