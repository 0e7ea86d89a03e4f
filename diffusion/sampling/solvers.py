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

Coefficients here are written so that they are finite at a first node without signal (alpha = 0:
flows, zero terminal SNR) and a last node without noise (sigma = 0), where nothing is evaluated.
In particular the step that keeps D and eps = (x - alpha D) / sigma fixed from (alpha, sigma) to
(alpha', sigma') is

    x' = alpha' D + sigma' eps = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffusion.levels import Array, NoiseLevel, posterior

REGISTERS = 4
"""Registers of every table here. The unused ones are zeros; with them, all tables of as many
evaluations have the same shape, and one compiled sampler serves them all."""


class Solver(NamedTuple):
    """A sampler's table of R evaluations and m registers; a pytree of float64 NumPy arrays.

    Attributes:
      level: [R] where the denoiser is evaluated; x must be at ``level[0]`` to begin with.
      A: [R, m, m] registers to registers.
      b: [R, m] the denoiser's estimate to registers.
      noise: [R, m] standard deviation of the (one) noise in each register; with learned variances
        the lower bound, at nu = 0.
      noise_upper: [R, m] the upper bound, at nu = 1; equal to ``noise`` for other solvers.
      init: () standard deviation of the initial x. By default sqrt(alpha^2 + sigma^2), the marginal
        of unit-variance data, 1 if variance is preserved; ``solver._replace(init=...)`` changes it.
    """

    level: NoiseLevel
    A: Array
    b: Array
    noise: Array
    noise_upper: Array
    init: Array

    @property
    def evaluations(self) -> int:
        """R."""
        return self.b.shape[-2]


def ddim(grid: NoiseLevel, eta: float = 0.0) -> Solver:
    """x' = alpha' D + sqrt(sigma'^2 - s^2) eps + s z, with s = eta times the posterior's deviation.

    Song et al., 2020, eq. 12 and 16, on any schedule; N evaluations. eta = 0 is deterministic,
    eta = 1 is ``ddpm``.

    Raises:
      ValueError: for eta outside [0, 1], or a grid that does not go from more to less noise.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    now, after = _steps(grid)
    _, variance, _, _ = posterior(now, after)
    std = eta * np.sqrt(variance)
    keep = np.sqrt(after.sigma**2 - std**2) / now.sigma
    table = _empty(now, grid)
    table.A[:, 0, 0] = keep
    table.b[:, 0] = after.alpha - now.alpha * keep
    table.noise[:, 0] = table.noise_upper[:, 0] = std
    return table


def euler(grid: NoiseLevel) -> Solver:
    """Euler's method on the probability-flow ODE; the same table as ``ddim`` with eta = 0.

    In k-diffusion's space, d(x/alpha)/d(sigma/alpha) = eps; in a flow's, x / (alpha + sigma) over
    sigma / (alpha + sigma), the derivative is the velocity eps - D. Along both, the path with D and
    eps held fixed is a straight line, so that Euler's step is DDIM's in either: EDM's and
    k-diffusion's Euler and a flow's Euler are this one formula, of order 1.
    """
    return ddim(grid)


def euler_ancestral(grid: NoiseLevel, eta: float = 1.0) -> Solver:
    """k-diffusion's Euler ancestral; the same table as ``ddim`` with this eta.

    An Euler step down to sigma_down, then noise sigma_up^2 + sigma_down^2 = sigma'^2, where
    sigma_up is eta times the posterior's deviation.
    """
    return ddim(grid, eta)


def ddpm(grid: NoiseLevel) -> Solver:
    """Samples q(x_s | x_t, x_0 = D), the posterior, in each step (Ho et al., 2020; "small").

    N evaluations, on any schedule and spacing; the last step, to clean data, adds no noise. If the
    denoiser gives learned variances, the log-variance is interpolated between the posterior's and
    the forward step's (Nichol & Dhariwal, 2021, eq. 15).
    """
    now, after = _steps(grid)
    beta, variance, from_x, from_x0 = posterior(now, after)
    table = _empty(now, grid)
    table.A[:, 0, 0] = from_x
    table.b[:, 0] = from_x0
    table.noise[:, 0] = np.sqrt(variance)
    table.noise_upper[:, 0] = np.where(after.sigma > 0, np.sqrt(beta), 0)
    return table


def ddpm_large(grid: NoiseLevel) -> Solver:
    """As ``ddpm``, with the forward step's variance beta instead ("fixed large"), never learned.

    Right for data of unit variance and many steps; meant for variance-preserving schedules.
    """
    table = ddpm(grid)
    return table._replace(noise=table.noise_upper)


def heun(grid: NoiseLevel) -> Solver:
    """Heun's method on d(x/alpha) / d(sigma/alpha) = eps (EDM, Karras et al., 2022, alg. 1).

    Order 2, two evaluations a step; the last step is Euler's if it goes to clean data: 2N - 1.
    Steps from sigma / alpha > 1000, where that space stretches without end (alpha = 0 has no point
    in it), are taken in ``flow_heun``'s.
    """
    now, _ = _steps(grid)
    return _heun(grid, np.where(now.sigma > 1e3 * now.alpha, 1.0, 0.0))


def flow_heun(grid: NoiseLevel) -> Solver:
    """Heun's method on d(x/s) / d(sigma/s) = eps - D, s = alpha + sigma, the flow's velocity.

    On rectified flow, where s = 1, this is x' = x + (t' - t) (v + v') / 2. Order 2; finite at
    alpha = 0, so the choice for schedules that start there. Evaluations as ``heun``.
    """
    return _heun(grid, np.ones(np.size(grid.alpha) - 1))


def _heun(grid: NoiseLevel, kappa: np.ndarray) -> Solver:
    """Heun's method on dy/dtau = eps - kappa D, y = x/s, tau = sigma/s, s = alpha + kappa sigma.

    kappa [N] says for each step in which of these spaces. In terms of x, the derivative is
    eps - kappa D = (x - s D) / sigma.
    """
    now, after = _steps(grid)
    s, s_after = now.alpha + kappa * now.sigma, after.alpha + kappa * after.sigma
    half = s_after * (after.sigma / s_after - now.sigma / s) / 2
    keep = after.sigma / now.sigma
    level = NoiseLevel(*(np.stack(pair, 1).ravel() for pair in zip(now, after)))
    table = _empty(level, grid)
    # y_0 becomes Euler's prediction, y_1 the base point plus half of the first derivative ...
    table.A[0::2, 0, 0] = keep
    table.b[0::2, 0] = after.alpha - now.alpha * keep
    table.A[0::2, 1, 0] = s_after / s + half / now.sigma
    table.b[0::2, 1] = -half * s / now.sigma
    # ... and then y_0 = y_1 plus half of the second.
    n = int(np.sum(after.sigma > 0))
    table.A[1 : 2 * n : 2, 0, 1] = 1
    table.A[1 : 2 * n : 2, 0, 0] = half[:n] / after.sigma[:n]
    table.b[1 : 2 * n : 2, 0] = -half[:n] * s_after[:n] / after.sigma[:n]
    return _first(table, len(now.t) + n)


def dpmpp_2m(grid: NoiseLevel) -> Solver:
    """DPM-Solver++ 2M: second-order multistep in data prediction (Lu et al., 2022b, alg. 2).

    x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) ((1 + w) D - w D_previous), with
    w = h / (2 h_previous) and h = log(alpha'/sigma') - log(alpha/sigma). N evaluations. The first
    step has order 1, as has the last if it goes to clean data (h = inf), and, since
    h_previous = inf, the second if the grid starts at alpha = 0.
    """
    now, after = _steps(grid)
    with np.errstate(divide="ignore"):
        h = np.log(after.alpha) - np.log(after.sigma) - np.log(now.alpha) + np.log(now.sigma)
    w = np.zeros_like(h)
    finite = np.isfinite(h[1:])
    w[1:][finite] = h[1:][finite] / (2 * h[:-1][finite])
    keep = after.sigma / now.sigma
    gain = after.alpha - now.alpha * keep
    table = _empty(now, grid)
    table.A[:, 0, 0] = keep
    table.b[:, 0] = gain * (1 + w)
    table.A[:, 0, 1] = -gain * w
    table.b[:, 1] = 1  # y_1 remembers D
    return table


def _steps(grid: NoiseLevel) -> tuple[NoiseLevel, NoiseLevel]:
    """The levels before and after each of the N steps, [N] each."""
    grid = NoiseLevel(*(np.asarray(a, np.float64) for a in grid))
    _, alpha, sigma = grid
    if alpha.ndim != 1 or len(alpha) < 2 or any(a.shape != alpha.shape for a in grid):
        raise ValueError(f"a grid has leaves [N + 1], N >= 1, got {[a.shape for a in grid]}")
    if not all(np.isfinite(a).all() for a in grid) or np.any(alpha < 0) or np.any(sigma < 0):
        raise ValueError("a grid's t, alpha and sigma must be finite, alpha and sigma >= 0")
    rises = sigma[:-1] * alpha[1:] <= sigma[1:] * alpha[:-1]
    if rises.any():
        i = int(np.argmax(rises))
        raise ValueError(
            f"sigma / alpha must decrease strictly along a grid, noisiest first; node {i} has "
            f"{sigma[i]:.6g} / {alpha[i]:.6g}, the next {sigma[i + 1]:.6g} / {alpha[i + 1]:.6g}"
        )
    return NoiseLevel(*(a[:-1] for a in grid)), NoiseLevel(*(a[1:] for a in grid))


def _empty(level: NoiseLevel, grid: NoiseLevel) -> Solver:
    """A table of zeros that evaluates at ``level`` [R] and starts at the grid's first node."""
    rows, m = len(level.t), REGISTERS
    init = np.hypot(np.float64(grid.alpha[0]), np.float64(grid.sigma[0]))
    noise, noise_upper = np.zeros((rows, m)), np.zeros((rows, m))
    return Solver(level, np.zeros((rows, m, m)), np.zeros((rows, m)), noise, noise_upper, init)


def _first(table: Solver, rows: int) -> Solver:
    """The table's first rows."""
    level = NoiseLevel(*(a[:rows] for a in table.level))
    return Solver(level, *(a[:rows] for a in table[1:-1]), table.init)
