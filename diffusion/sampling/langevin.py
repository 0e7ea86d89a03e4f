"""Langevin correctors (score-SDE's predictor-corrector sampling, Song et al., 2021, alg. 2-5).

A solver's step predicts x at the next noise level; a corrector then moves it, at that level, by

    x <- x + e s(x) + sqrt(2 e) z,    s = (alpha D - x) / sigma^2,  z ~ N(0, I),

which leaves the marginal p_t alone for small e. ``sample(..., corrector=partial(langevin, ...))``
runs one after each step but the last, which ends without noise. With ``solvers.ddpm_large`` on a
variance-exploding schedule that is Song et al.'s algorithm 2, whose predictor is the reverse
diffusion; any solver with one evaluation per step may predict.

After many steps of size e a Gaussian of variance v has v / (1 - e / (2 v)), too much by e / 2.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.denoiser import Denoise, as_estimate
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.tables import Solver

Corrector = Callable[[Denoise, Array, NoiseLevel, jax.Array], Array]


def langevin(
    denoise: Denoise,
    x: Array,
    level: NoiseLevel,
    keys: jax.Array,
    steps: int = 1,
    snr: float = 0.16,
) -> Array:
    """Steps of size e = 2 (snr |z| / |s|)^2 (Song et al., 2021, alg. 4).

    Each image has its own norms, so that it does not depend on its batch; the original averages
    them over the batch. Where the score vanishes e has no bound: this is for images, whose norms
    hardly vary, and ``annealed_langevin`` for few dimensions. The original's further factor
    alpha_t (alg. 5, variance-preserving), of one of 1000 steps, is about 1 and omitted.

    x [B, ...] is at this level, whose leaves are (), with sigma > 0; ``keys`` are [B] typed keys.
    There are ``steps`` >= 1, each with one evaluation. ``snr`` > 0 is r of the paper, which takes
    0.16 (VE) and 0.01 to 0.05 (VP), by size of image.
    """

    def size(score: Array, z: Array) -> Array:
        axes = tuple(range(1, x.ndim))
        return 2 * snr**2 * (z**2).sum(axes, keepdims=True) / (score**2).sum(axes, keepdims=True)

    return _walk(denoise, x, level, keys, steps, snr, size)


def annealed_langevin(
    denoise: Denoise,
    x: Array,
    level: NoiseLevel,
    keys: jax.Array,
    steps: int = 1,
    snr: float = 0.16,
) -> Array:
    """Steps of size e = 2 (snr sigma)^2, the same for all x (Song & Ermon, 2019, alg. 1).

    It equals ``langevin`` where the score is mostly noise, |s| = |z| / sigma. It is safe in any
    number of dimensions (snr < 1), but slow where the data are smoother than sigma. Arguments are
    those of ``langevin``.
    """
    return _walk(denoise, x, level, keys, steps, snr, lambda *_: 2 * (snr * level.sigma) ** 2)


def _walk(
    denoise: Denoise,
    x: Array,
    level: NoiseLevel,
    keys: jax.Array,
    steps: int,
    snr: float,
    size: Callable[[Array, Array], Array],
) -> Array:
    if operator.index(steps) < 1 or not 0 < snr <= 1e3:
        raise ValueError(f"expected steps >= 1 and 0 < snr <= 1000, got steps={steps}, snr={snr}")

    def move(x: Array, j: Array) -> tuple[Array, None]:
        score = (level.alpha * as_estimate(denoise(x, level), x).x0 - x) / level.sigma**2
        folded = jax.vmap(lambda key: jax.random.fold_in(key, j))(keys)
        flat = jax.vmap(lambda key: jax.random.normal(key, (math.prod(x.shape[1:]),), x.dtype))
        z = flat(folded).reshape(x.shape)
        e = size(score, z)
        return (x + e * score + jnp.sqrt(2 * e) * z).astype(x.dtype), None

    return jax.lax.scan(move, x, jnp.arange(steps))[0]


def check_predictor(solver: Solver, grid: NoiseLevel) -> None:
    """Raises ValueError for a solver with stages, whose steps a corrector would disturb.

    Each row must go from one node of the grid to the next.
    """
    count, steps = solver.evaluations, len(grid.alpha) - 1
    pairs = [(solver.level.alpha, grid.alpha), (solver.level.sigma, grid.sigma)]
    if count != steps or not all(np.allclose(level, nodes[:-1]) for level, nodes in pairs):
        raise ValueError(
            "a corrector needs a solver with one evaluation per step, at the grid's levels (ddpm, "
            f"ddim, euler, dpmpp_2m, ...); this one has {count} evaluations for {steps} steps"
        )


CHOICES = {f.__name__: f for f in (langevin, annealed_langevin)}
