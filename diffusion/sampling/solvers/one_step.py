"""Solvers with one evaluation a step and no memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from diffusion.errors import check_range
from diffusion.levels import NoiseLevel, posterior
from diffusion.sampling.tables import RAW, Combination, D, Row, Solver, X, Z, nodes, step, table
from diffusion.schedules import Schedule


def ddim(grid: NoiseLevel, eta: float = 0.0, keep_eps: bool = False) -> Solver:
    """x' = alpha' D + sqrt(sigma'^2 - s^2) eps + s z, with s = eta times the posterior's deviation.

    Song et al., 2020, eq. 12 and 16, on any schedule; N evaluations. eta lies in [0, 1]: 0 is
    deterministic, 1 is ``ddpm``.

    eps = (x - alpha D) / sigma is computed from the clipped D, if D is clipped, as in ADM's code.
    With ``keep_eps`` it is computed from the unclipped D, which is diffusers' default: then x' is
    off the line through x by alpha (clipped - unclipped D) in every step, and many steps do not
    converge.
    """
    estimate = RAW if keep_eps else D
    return table([ddim_row(*pair, eta, estimate) for pair in pairwise(nodes(grid))])


def ddim_row(
    now: NoiseLevel, after: NoiseLevel, eta: float = 0.0, estimate: Combination = D
) -> Row:
    """The step of ``ddim`` between two levels; eps is computed from ``estimate``, D or RAW."""
    down, std = ancestral(now, after, eta)
    keep = down.sigma / now.sigma
    return Row(now, [keep * X + after.alpha * D - now.alpha * keep * estimate + std * Z])


def euler(grid: NoiseLevel) -> Solver:
    """Euler's method on the probability-flow ODE; the same as ``ddim`` with eta = 0.

    In k-diffusion's space, d(x/alpha)/d(sigma/alpha) = eps; in a flow's, x / (alpha + sigma) over
    sigma / (alpha + sigma), the derivative is the velocity eps - D. Along both, the path with D and
    eps held fixed is a straight line: EDM's, k-diffusion's and a flow's Euler are this one formula,
    of order 1.
    """
    return table([Row(now, [step(X, D, now, after)]) for now, after in pairwise(nodes(grid))])


def euler_ancestral(grid: NoiseLevel, eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """k-diffusion's Euler ancestral: an Euler step below the next level, and noise up to it.

    sigma_down^2 + sigma_up^2 = sigma'^2, with sigma_up = eta in [0, 1] times the posterior's
    deviation; the noise added is s_noise sigma_up. With s_noise = 1 it is ``ddim`` with this eta.
    """
    return ancestral_table(grid, eta, s_noise)


def ancestral_table(
    grid: NoiseLevel,
    eta: float,
    s_noise: float,
    stages: Callable[[NoiseLevel, NoiseLevel, NoiseLevel, float], list[Row]] | None = None,
) -> Solver:
    """The table whose steps go below the next level, and up to it with noise.

    ``stages(now, down, after, deviation of the noise)`` gives a step's rows, where the step does
    not start at alpha = 0 or end at clean data; those steps are Euler's, as are all without it.
    """
    check_range("s_noise", s_noise, 0)
    rows = []
    for now, after in pairwise(nodes(grid)):
        down, up = ancestral(now, after, eta)
        if stages is None or after.sigma == 0 or now.alpha == 0:
            rows.append(Row(now, [step(X, D, now, down) + s_noise * up * Z]))
        else:
            rows += stages(now, down, after, s_noise * up)
    return table(rows)


def ancestral(now: NoiseLevel, after: NoiseLevel, eta: float) -> tuple[NoiseLevel, float]:
    """The level below ``after`` to step down to, and the deviation of the noise up to ``after``."""
    check_range("eta", eta, 0, 1)
    up = eta * np.sqrt(posterior(now, after)[1])
    return after._replace(sigma=np.sqrt(after.sigma**2 - up**2)), up


def ddpm(grid: NoiseLevel) -> Solver:
    """Samples q(x_s | x_t, x_0 = D), the posterior, in each step (Ho et al., 2020; "small").

    N evaluations, on any schedule and spacing; the last step, to clean data, adds no noise. If the
    denoiser gives learned variances, the log-variance is interpolated between the posterior's and
    the forward step's (Nichol & Dhariwal, 2021, eq. 15).
    """
    rows, upper = [], []
    for now, after in pairwise(nodes(grid)):
        beta, variance, from_x, from_x0 = posterior(now, after)
        rows.append(Row(now, [from_x * X + from_x0 * D + np.sqrt(variance) * Z]))
        upper.append(np.sqrt(beta) if after.sigma > 0 else 0)
    solver = table(rows)
    solver.noise_upper[:, 0] = upper
    return solver


def ddpm_large(grid: NoiseLevel) -> Solver:
    """``ddpm`` with the forward step's variance beta ("fixed large"), which is never learned.

    It is right for data of unit variance and many steps, on variance-preserving schedules.
    """
    solver = ddpm(grid)
    return solver._replace(noise=solver.noise_upper)


def lcm(grid: NoiseLevel, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> Solver:
    """Multistep sampling of a latent consistency model (Luo et al., 2023, alg. 3), N evaluations.

    x' = alpha' f + sigma' z with f = c_skip x + c_out D, where with s = timestep_scaling k at the
    schedule's step k = 1000 t - 1: c_skip = sigma_data^2 / (s^2 + sigma_data^2), c_out = s /
    sqrt(s^2 + sigma_data^2). Their networks are trained so; the constants are diffusers'.
    """
    check_range("sigma_data", sigma_data, 0, above=True)
    check_range("timestep_scaling", timestep_scaling, 0, above=True)
    rows = []
    for now, after in pairwise(nodes(grid)):
        scaled = timestep_scaling * (1000 * now.t - 1)
        skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        f = skip * X + scaled / np.hypot(scaled, sigma_data) * D
        rows.append(Row(now, [after.alpha * f + after.sigma * Z]))
    return table(rows)


def tcd(grid: NoiseLevel, schedule: Schedule, gamma: float = 0.3) -> Solver:
    """Strategic stochastic sampling of a trajectory consistency model (Zheng et al., 2024, alg. 4).

    Each step goes along the ODE (D and eps fixed) to s = (1 - gamma) t', and from there up to t'
    with noise; both are times that ``schedule`` is called with. gamma lies in [0, 1]: 0 is
    deterministic, ``ddim``; 1 jumps to clean data and is multistep consistency sampling.
    """
    check_range("gamma", gamma, 0, 1)
    pairs = list(pairwise(nodes(grid)))
    below = [schedule((1 - gamma) * schedule.argument(after)) for _, after in pairs]
    return table([tcd_row(now, low, after) for (now, after), low in zip(pairs, below)])


def tcd_row(now: NoiseLevel, below: NoiseLevel, after: NoiseLevel) -> Row:
    """From ``now`` to ``below`` along the ODE, then up to ``after`` with noise."""
    scale = after.alpha / below.alpha
    if scale * below.sigma > after.sigma * (1 + 1e-9):
        raise ValueError(f"the level to step down to, {below}, has more noise than {after}")
    std = np.sqrt(np.maximum(after.sigma**2 - (scale * below.sigma) ** 2, 0))
    return Row(now, [scale * step(X, D, now, below) + std * Z])


def consistency(grid: NoiseLevel, sigma_min: float = 0.002) -> Solver:
    """Multistep consistency sampling (Song et al., 2023, alg. 1), N evaluations.

    x' = alpha' D + sqrt(sigma'^2 - (alpha' sigma_min)^2) z, where D is a consistency model's sample
    at sigma_min, the smallest noise it was trained on; the last step adds no noise.
    """
    rows, (*path, _) = [], nodes(grid)
    check_range("sigma_min", sigma_min, 0, path[-1].ratio)
    for now, after in pairwise(nodes(grid)):
        variance = after.sigma**2 - (after.alpha * sigma_min) ** 2
        rows.append(Row(now, [after.alpha * D + np.sqrt(np.maximum(variance, 0)) * Z]))
    return table(rows)
