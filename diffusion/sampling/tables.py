"""Samplers as tables of numbers.

Every sampler on a fixed grid is a general linear method (Butcher). Its state is a few registers
Y = (y_0, ..., y_{m-1}), images all of them; y_0 is the current x. One row of the table is one
evaluation of the denoiser:

    D = denoise(y_0, level)                          E[x_0 | x]
    Y <- A Y + b D + c z                             z ~ N(0, I), only where the row has noise

A method keeps what it needs later (earlier D, eps or velocities, the step's base point, a stage's
noise) in registers, in any linear combination; startup and final steps are ordinary rows. A method
that adds noise *before* an evaluation (EDM's churn) has it in the previous row's c; before the
first evaluation it is the initial noise. So a solver is one function ``grid -> Solver`` in float64
NumPy, and ``sample`` runs any of them. Its table is an argument of the jitted function: another
sampler, grid or eta with as many evaluations does not compile again.

A solver is written as its paper's algorithm, on the symbols ``X``, ``Y[k]``, ``D`` and ``Z`` below.
A symbol is a vector of coefficients over all of them, so that ``0.5 * X + 2 * D`` is that linear
combination, in plain NumPy, and a row is the list of what the registers become:

    rows = [Row(now, [step(X, D, now, after)]) for now, after in pairwise(nodes(grid))]

Coefficients are written so that they are finite at a first node without signal (alpha = 0: flows,
zero terminal SNR) and at a last node without noise (sigma = 0), where nothing is evaluated.
``step``, which holds D and eps = (x - alpha D) / sigma fixed, has such a form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion.levels import Array, NoiseLevel

REGISTERS = 6
"""Registers of every table; unused ones are zeros. Tables of as many evaluations thus have the same
shape, and one compiled sampler serves them all."""

*Y, D, RAW, Z = np.eye(REGISTERS + 3)
"""The registers, the denoiser's estimate of x_0, the estimate before it was clipped or thresholded
(the same as D if it was not), and standard normal noise, new in each row."""
X = Y[0]
"""The current x, at which the denoiser is evaluated."""

Combination = np.ndarray  # [m + 3], a linear combination of these symbols


class Solver(NamedTuple):
    """A sampler's table of R evaluations and m registers; a pytree of float64 NumPy arrays.

    Attributes:
      level: [R] where the denoiser is evaluated; the first x must be at ``level[0]``.
      A: [R, m, m] registers to registers.
      b: [R, m] the denoiser's estimate to registers.
      b_raw: [R, m] the estimate before clipping to registers; zeros for most.
      noise: [R, m] standard deviation, in each register, of the row's one noise; with learned
        variances the lower bound, at nu = 0.
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
    """One evaluation: its level, and what the first few registers become; the others become 0."""

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


def eps(level: NoiseLevel) -> Combination:
    """(x - alpha D) / sigma, the noise in the current x."""
    return (X - level.alpha * D) / level.sigma


def estimate(level: NoiseLevel, prediction: str) -> Combination:
    """The quantity that a method keeps: D for prediction "x0", eps for "eps"."""
    return D if prediction == "x0" else eps(level)


def eps_step(x: Combination, e: Combination, now: NoiseLevel, after: NoiseLevel) -> Combination:
    """The step along eps held fixed: x'/alpha' = x/alpha + (rho' - rho) eps, rho = sigma/alpha."""
    grow = after.alpha / now.alpha
    return grow * x + (after.sigma - grow * now.sigma) * e


def check_choice(name: str, value: object, choices: Sequence) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}")


def check_entries(name: str, given: Sequence, path: Sequence[NoiseLevel]) -> None:
    """Raises ValueError unless ``given`` has an entry for each step along the path."""
    if not isinstance(given, Sequence) or len(given) != len(path) - 1:
        raise ValueError(f"{name} must have {len(path) - 1} entries, one per step, got {given!r}")


def nodes(grid: NoiseLevel, rising: bool = False) -> list[NoiseLevel]:
    """The grid's N + 1 levels, one by one.

    Raises:
      ValueError: for a grid that does not go from more to less noise at every node or, with
        ``rising``, for inversion, from less to more.
    """
    if not isinstance(grid, NoiseLevel):
        raise ValueError(
            f"a grid is a NoiseLevel of t, alpha and sigma, got {type(grid).__name__}; of sigmas "
            "(sigma / alpha), grids.from_sigmas(schedule, sigmas) makes one, of times from_times"
        )
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
        order = "increase strictly" if rising else "decrease strictly, noisiest first"
        raise ValueError(
            f"along a grid sigma / alpha must {order}; node {i} has "
            f"{sigma[i]:.6g} / {alpha[i]:.6g}, the next {sigma[i + 1]:.6g} / {alpha[i + 1]:.6g}"
        )
    return [NoiseLevel(*leaves) for leaves in zip(*grid)]


def log_ratio(level: NoiseLevel) -> float:
    """lambda = log(alpha / sigma), half the log SNR; -inf at alpha = 0, inf at sigma = 0."""
    with np.errstate(divide="ignore"):
        return np.log(level.alpha) - np.log(level.sigma)


def steady_orders(lam: Sequence[float], jump: float) -> list[int]:
    """[N] how many estimates, newest first, each step of a multistep method may use.

    The step from lam[i] may use those before which no step is shorter than 1 / ``jump`` of it.
    """
    if not jump > 0:
        raise ValueError(f"jump must be positive, got {jump}; inf leaves all orders as they are")
    steps = np.abs(np.diff(lam))
    orders = []
    for i in range(len(steps)):
        short = [j for j in range(i) if jump < math.inf and steps[i] > jump * steps[j]]
        orders.append(i - short[-1] if short else i + 1)
    return orders


def far(level: NoiseLevel) -> bool:
    """Whether sigma/alpha exceeds 1000: too far for steps in x/alpha over sigma/alpha.

    A long step's first guess and its correction are both much larger than x in that space, so that
    x would be lost in their difference in float32.
    """
    return bool(level.sigma > 1e3 * level.alpha)
