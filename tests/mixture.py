"""A one-dimensional Gaussian mixture whose probability flow is known exactly."""

import jax
import numpy as np
from scipy.special import ndtr

from diffusion.levels import NoiseLevel
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample

MEANS, STDS, WEIGHTS = np.array([-0.6, 0.7]), np.array([0.3, 0.2]), np.array([0.4, 0.6])
MIXTURE = gaussian_mixture(MEANS[:, None], STDS, WEIGHTS)
P = np.linspace(0.01, 0.99, 21)  # quantiles to follow; tests share shapes to share compilations


@jax.jit
def run(solver, x):
    """x [B, 1] along the table with the mixture's exact denoiser."""
    return sample(MIXTURE, solver, image_keys(0, np.arange(len(x))), (1,), x_init=x)


def cdf(x, level):
    """Of x_t, for x [B, 1]."""
    std = np.sqrt((level.alpha * STDS) ** 2 + level.sigma**2)
    return ndtr((x - level.alpha * MEANS) / std) @ WEIGHTS


def quantile(p, level):
    """The probability-flow ODE keeps each point's quantile, so this is its exact solution."""
    low, high = np.full_like(p, -100.0), np.full_like(p, 100.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(middle[:, None], level) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return ((low + high) / 2)[:, None]


def at(grid, i):
    """The grid's level i."""
    return NoiseLevel(*(a[i] for a in grid))


def moments(solver, m, s):
    """Mean and variance of x after the table, for x_0 ~ N(m, s^2) in one dimension, exactly.

    The denoiser is linear there, so each row is an affine map of the registers.
    """
    mean, cov = np.zeros(solver.A.shape[1]), np.zeros(solver.A.shape[1:])
    first = at(solver.level, 0)
    mean[0], cov[0, 0] = first.alpha * m, (first.alpha * s) ** 2 + first.sigma**2
    for r in range(solver.evaluations):
        _, alpha, sigma = at(solver.level, r)
        gain = alpha * s**2 / ((alpha * s) ** 2 + sigma**2)
        A, b = solver.A[r].copy(), solver.b[r] + solver.b_raw[r]
        A[:, 0] += b * gain
        mean = A @ mean + b * (1 - gain * alpha) * m
        cov = A @ cov @ A.T + np.outer(solver.noise[r], solver.noise[r])
    return mean[0], cov[0, 0]
