"""From pictures to the noise that a sampler draws them from: the probability-flow ODE, upwards.

Inversions are tables (``tables``) made from the sampler's own grid, which they follow from its last
node to its first. ``solver.init`` is the factor on the picture at the beginning. The denoiser must
not clip, and conditioning should be the picture's own, unguided.

The table shows the mean PSNR in dB of 100 held-out 8 x 8 digits, inverted and drawn again by DDIM
(after ``heun`` by flow_heun) on uniform cosine grids, with the exact denoiser of the training
digits, each with a standard deviation of 0.2:

    steps    euler    ddim    heun    fixed_point    2 iterations    4 iterations
       50     20.6    19.9    30.9           27.2            22.4            24.0
      200     23.2    21.3    39.5           32.3            41.1            50.8

A small network's denoiser is smoother. With that of colabs/editing.ipynb and 20 held-out digits:

    steps    euler    ddim    fixed_point    4 iterations
       50     37.3    33.3           52.8            65.5
      200     47.3    42.8           69.5           104.5
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.sample import sample
from diffusion.sampling.tables import D, Row, Solver, X, Y, eps, eps_step, nodes, step, table


def invert(denoise: Denoise, solver: Solver, x: Array) -> Array:
    """x [B, ...] at the grid's last node (a picture, if it is clean) -> x at its first, noise.

    ``sample(..., x_init=invert(...))`` returns the picture up to both solvers' errors.
    """
    keys = jax.random.split(jax.random.key(0), len(x))  # no row has noise
    start = jnp.asarray(solver.init, x.dtype) * x
    return sample(denoise, solver, keys, x.shape[1:], x_init=start)


def euler(grid: NoiseLevel) -> Solver:
    """x' = alpha' D + sigma' eps, D and eps from the less noisy end of each step (DDIM, upwards).

    Song et al., 2020, sections 4.3 and 5.4. Nothing is evaluated at clean data: on a grid that ends
    there, of at least two steps, alpha x_0 is taken for x at the node before, with N - 1
    evaluations. Order 1.
    """
    path, scale = _upwards(grid)
    rows = [Row(now, [step(X, D, now, after)]) for now, after in pairwise(path)]
    return table(rows)._replace(init=scale)


def heun(grid: NoiseLevel) -> Solver:
    """Heun's method on the flow's velocity, upwards, beginning as ``euler``; order 2.

    Two evaluations a step, also at alpha = 0 (``solvers.flow_heun``).
    """
    path, scale = _upwards(grid)
    rows = []
    for now, after in pairwise(path):
        ratio, gain = _velocity_step(now, after)
        base = ratio * X + gain / 2 * _velocity(now)
        rows.append(Row(now, [ratio * X + gain * _velocity(now), base]))
        rows.append(Row(after, [Y[1] + gain / 2 * _velocity(after)]))
    return table(rows)._replace(init=scale)


def ddim(grid: NoiseLevel) -> Solver:
    """DDIM inversion as in Stable Diffusion's editors and diffusers' DDIMInverseScheduler.

    The network evaluates the less noisy x at the noisier level, so that it can start from clean
    data; N evaluations. eps = (x - alpha D) / sigma at that level is the network's output if it
    predicts eps. Order 1.
    """
    pairs = [*pairwise(nodes(grid))][::-1]  # (noisier, less noisy), the last step first
    rows = [Row(after, [eps_step(X, eps(after), before, after)]) for after, before in pairs]
    return table(rows)._replace(init=1.0)


def fixed_point(grid: NoiseLevel, iterations: int = 1) -> Solver:
    """Undoes ``solvers.ddim``: solves x_s = DDIM(x_t, t) for x_t, in each step (Pan et al., 2023).

    With y = x / (alpha + sigma), tau = sigma / (alpha + sigma) and v = eps - D, DDIM's step is
    y_s = y_t + (tau_s - tau_t) v(x_t, t). The iteration y_t = y_s + (tau_t - tau_s) v(x_t, t)
    starts with the velocity of the step before. One iteration returns to the picture with order 2
    (``ddim`` and ``euler`` have order 1), and each further one adds an order if the steps are short
    enough for convergence; 50 steps were too few in the table above. A clean end and a start at
    alpha = 0 need no special step, but a single step from alpha = 0 to the end cannot be undone.
    ``iterations`` >= 1 are the evaluations a step.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    pairs = [*pairwise(nodes(grid))][::-1]
    first, clean = pairs[0]
    if first.alpha == 0:
        raise ValueError(
            "the step from alpha = 0 to the grid's end keeps nothing of the picture; the grid "
            "needs a level between them"
        )
    # Before the first velocity eps counts as 0: x_t begins as (alpha_t / alpha_s) x_s.
    base = (first.alpha + first.sigma) / (clean.alpha + clean.sigma) * clean.alpha / first.alpha * X
    rows = []
    for i, (level, before) in enumerate(pairs):
        _, gain = _velocity_step(before, level)
        for _ in range(iterations):
            new = base + gain * _velocity(level)
            rows.append(Row(level, [new, base]))
            base = Y[1]
        if i + 1 < len(pairs):  # from here on to the next level, with this velocity
            ratio, gain = _velocity_step(level, pairs[i + 1][0])
            rows[-1] = Row(level, [ratio * new + gain * _velocity(level), ratio * new])
    return table(rows)._replace(init=first.alpha / clean.alpha)


def _upwards(grid: NoiseLevel) -> tuple[list[NoiseLevel], float]:
    """The nodes with noise, least first, and the factor on x to be at the first of them."""
    path = nodes(grid)[::-1]
    if path[0].sigma > 0:
        return path, 1.0
    if len(path) < 3:
        raise ValueError(
            "a grid of one step to clean data has no step between noisy nodes; expected 2 steps"
        )
    return path[1:], path[1].alpha / path[0].alpha


def _velocity_step(now: NoiseLevel, after: NoiseLevel) -> tuple[float, float]:
    """x' = ratio x + gain v is Euler's step."""
    s, s_after = now.alpha + now.sigma, after.alpha + after.sigma
    return s_after / s, s_after * (after.sigma / s_after - now.sigma / s)


def _velocity(level: NoiseLevel):
    """v = eps - D = (x - (alpha + sigma) D) / sigma."""
    return (X - (level.alpha + level.sigma) * D) / level.sigma
