"""The meaning of the network's output.

A noised example and the network's ideal output F* are two linear combinations of data and noise:

    [x_t]   [alpha  sigma] [x_0]
    [F* ] = [  a      b  ] [eps]

A prediction is the second row. Everything else follows by solving the 2 x 2 system, in one place:

    F*      = a x_0 + b eps                                      (training target)
    x_0_hat = c_skip x_t + c_out F,   c_skip = b / det,  c_out = -sigma / det,
                                      det = alpha b - sigma a

Both a and b are finite at both ends of every schedule. Where the system cannot be solved (eps at
alpha = 0), det = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel


class Row(NamedTuple):
    """F* = a x_0 + b eps, computed from an input scaled by c_in."""

    a: Array
    b: Array
    c_in: Array


class Preconditioning(NamedTuple):
    """x_0_hat = c_skip x_t + c_out F(c_in x_t)."""

    c_in: Array
    c_skip: Array
    c_out: Array


Prediction = Callable[[NoiseLevel], Row]


def eps(level: NoiseLevel) -> Row:
    """The noise (DDPM, Ho et al., 2020)."""
    one = jnp.ones_like(level.alpha)
    return Row(0 * one, one, one)


def x0(level: NoiseLevel) -> Row:
    """The clean data."""
    one = jnp.ones_like(level.alpha)
    return Row(one, 0 * one, one)


def v(level: NoiseLevel) -> Row:
    """v = alpha eps - sigma x_0 (Salimans & Ho, 2022)."""
    return Row(-level.sigma, level.alpha, jnp.ones_like(level.alpha))


def flow(level: NoiseLevel) -> Row:
    """The flow's velocity eps - x_0, which is dx/dt on the rectified flow."""
    one = jnp.ones_like(level.alpha)
    return Row(-one, one, one)


def edm(level: NoiseLevel, sigma_data: float = 0.5) -> Row:
    """EDM's preconditioning (Karras et al., 2022, table 1), for any alpha.

    Input and target have unit variance when the data have standard deviation sigma_data. With
    sigma_data = 1 on a variance-preserving schedule this is -v. sigma_data > 0.
    """
    check_range("sigma_data", sigma_data, 0, above=True)
    norm = jnp.sqrt((level.alpha * sigma_data) ** 2 + level.sigma**2)
    return Row(level.sigma / (sigma_data * norm), -level.alpha * sigma_data / norm, 1 / norm)


def precondition(prediction: Prediction, level: NoiseLevel) -> Preconditioning:
    """The three coefficients that turn a network into a denoiser."""
    a, b, c_in = prediction(level)
    det = level.alpha * b - level.sigma * a
    return Preconditioning(c_in, b / det, -level.sigma / det)


def target(prediction: Prediction, level: NoiseLevel, x0: Array, noise: Array) -> Array:
    """F* = a x_0 + b eps for x0, noise [B, ...] and level leaves () or [B]."""
    row = prediction(level.expand(x0.ndim))
    return row.a * x0 + row.b * noise


def to_x0(prediction: Prediction, level: NoiseLevel, x: Array, output: Array) -> Array:
    """The estimate of x_0 from x_t and the network's output, both [B, ...]."""
    c = precondition(prediction, level.expand(x.ndim))
    return c.c_skip * x + c.c_out * output


CHOICES = {f.__name__: f for f in (eps, x0, v, flow, edm)}
