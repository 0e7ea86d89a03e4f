"""Samplers as tables of numbers.

Every sampler on a fixed grid is a general linear method (Butcher). Its state is a few registers
Y = (y_0, ..., y_{m-1}), images all of them; y_0 is the current x. One row of the table is one
evaluation of the denoiser:

    D = denoise(y_0, level)                          E[x_0 | x]
    Y <- A Y + b D + c z                             z ~ N(0, I), only where the row has noise

What a method remembers (earlier D, eps or velocities, the step's base point, the noise of a stage)
it keeps in registers, in whatever combination it likes; startup and final steps are just rows.
Noise that a method wants *before* an evaluation (EDM's churn) is the previous row's c, and the
initial noise for the first. So a solver is one function ``grid -> Solver`` in float64 NumPy, and
``sample`` runs any of them: as an argument of the jitted function, so that another sampler, grid or
eta with as many evaluations does not compile again.

A solver is written as its paper's algorithm, on symbols: ``X`` is the register y_0, ``Y[k]`` is
y_k, ``D`` the denoiser's estimate, ``Z`` the row's noise. A symbol is a vector of coefficients over
all of them, so that ``0.5 * X + 2 * D`` is that linear combination, in plain NumPy, and a row is
the list of what the registers become:

    rows = [Row(now, [step(X, D, now, after)]) for now, after in pairwise(nodes(grid))]

Coefficients are written so that they are finite at a first node without signal (alpha = 0: flows,
zero terminal SNR) and a last node without noise (sigma = 0), where nothing is evaluated; ``step``
is the step that holds D and eps = (x - alpha D) / sigma fixed, in such a form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion.levels import Array, NoiseLevel

REGISTERS = 6
"""Registers of every table here. The unused ones are zeros; with them, all tables of as many
evaluations have the same shape, and one compiled sampler serves them all."""

Y = np.eye(REGISTERS + 3)[:REGISTERS]
"""The registers, [m, m + 3]: rows of the identity, as are the following."""
X = Y[0]
"""The current x, which the denoiser is evaluated at."""
D = np.eye(REGISTERS + 3)[REGISTERS]
"""The denoiser's estimate of x_0."""
RAW = np.eye(REGISTERS + 3)[REGISTERS + 1]
"""The estimate before it was clipped or thresholded; the same as D if it was not."""
Z = np.eye(REGISTERS + 3)[REGISTERS + 2]
"""Standard normal noise, new in each row."""

Combination = np.ndarray  # [m + 3], a linear combination of the above


class Solver(NamedTuple):
    """A sampler's table of R evaluations and m registers; a pytree of float64 NumPy arrays.

    Attributes:
      level: [R] where the denoiser is evaluated; x must be at ``level[0]`` to begin with.
      A: [R, m, m] registers to registers.
      b: [R, m] the denoiser's estimate to registers.
      b_raw: [R, m] the estimate before clipping to registers; zeros for most.
      noise: [R, m] standard deviation of the (one) noise in each register; with learned variances
        the lower bound, at nu = 0.
      noise_upper: [R, m] the upper bound, at nu = 1; equal to ``noise`` for other solvers.
      init: () standard deviation of the initial x. By default sqrt(alpha^2 + sigma^2), the marginal
        of unit-variance data, 1 if variance is preserved; ``solver._replace(init=...)`` changes it.
    """

    level: NoiseLevel
    A: Array
    b: Array
    b_raw: Array
    noise: Array
    noise_upper: Array
    init: Array

    @property
    def evaluations(self) -> int:
        """R."""
        return self.b.shape[-2]


class Row(NamedTuple):
    """One evaluation: where, and what the registers (the first few; others: 0) become."""

    level: NoiseLevel
    registers: Sequence[Combination]


def table(rows: Sequence[Row]) -> Solver:
    """The solver with these rows."""
    level = NoiseLevel(*(np.array(leaf, np.float64) for leaf in zip(*(r.level for r in rows))))
    new = np.zeros((len(rows), REGISTERS, REGISTERS + 3))
    for filled, row in zip(new, rows):
        filled[: len(row.registers)] = row.registers
    A, (b, b_raw, noise) = new[..., :REGISTERS], np.moveaxis(new[..., REGISTERS:], -1, 0)
    init = np.hypot(level.alpha[0], level.sigma[0])
    return Solver(level, A.copy(), b.copy(), b_raw.copy(), noise.copy(), noise.copy(), init)


def step(x: Combination, d: Combination, now: NoiseLevel, after: NoiseLevel) -> Combination:
    """alpha' D + sigma' eps with eps = (x - alpha D) / sigma: D and eps held fixed.

    Written (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D, which is finite wherever sigma > 0.
    """
    keep = after.sigma / now.sigma
    return keep * x + (after.alpha - now.alpha * keep) * d


def nodes(grid: NoiseLevel, rising: bool = False) -> list[NoiseLevel]:
    """The grid's N + 1 levels, one by one; ``rising``: from less to more noise, for inversion.

    Raises:
      ValueError: for a grid that does not go, node by node, from more to less noise (rising: from
        less to more).
    """
    grid = NoiseLevel(*(np.asarray(a, np.float64) for a in grid))
    _, alpha, sigma = grid
    if alpha.ndim != 1 or len(alpha) < 2 or any(a.shape != alpha.shape for a in grid):
        raise ValueError(f"a grid has leaves [N + 1], N >= 1, got {[a.shape for a in grid]}")
    if not all(np.isfinite(a).all() for a in grid) or np.any(alpha < 0) or np.any(sigma < 0):
        raise ValueError("a grid's t, alpha and sigma must be finite, alpha and sigma >= 0")
    here, there = sigma[:-1] * alpha[1:], sigma[1:] * alpha[:-1]
    rises = here >= there if rising else here <= there
    if rises.any():
        i = int(np.argmax(rises))
        order = (
            "increase strictly along a rising grid"
            if rising
            else "decrease strictly along a grid, noisiest first"
        )
        raise ValueError(
            f"sigma / alpha must {order}; node {i} has "
            f"{sigma[i]:.6g} / {alpha[i]:.6g}, the next {sigma[i + 1]:.6g} / {alpha[i + 1]:.6g}"
        )
    return [NoiseLevel(*leaves) for leaves in zip(*grid)]


def log_ratio(level: NoiseLevel) -> float:
    """lambda = log(alpha / sigma), half the log SNR; -inf at alpha = 0, inf at sigma = 0."""
    with np.errstate(divide="ignore"):
        return np.log(level.alpha) - np.log(level.sigma)


def far(level: NoiseLevel) -> bool:
    """Whether sigma/alpha > 1000, or infinite: too far for steps in x/alpha over sigma/alpha.

    That space stretches without end there. What a method takes back of a long step's first guess
    would be as much larger than x, and float32 would lose x in it.
    """
    return bool(level.sigma > 1e3 * level.alpha)
