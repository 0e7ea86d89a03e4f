"""Solvers with two evaluations a step: Heun's, midpoints, and EDM's with churn.

The probability-flow ODE is a different one in each scaling of x: with y = x/s, tau = sigma/s and
s = alpha + kappa sigma it reads

    dy/dtau = eps - kappa D = (x - s D) / sigma.

kappa = 0 is k-diffusion's and EDM's space, x/alpha over sigma/alpha, kappa = 1 a flow's, where the
derivative is the velocity, which is also finite at alpha = 0. Euler's step is the same in all.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from diffusion.errors import check_range
from diffusion.levels import NoiseLevel
from diffusion.sampling.solvers.one_step import ancestral_table
from diffusion.sampling.tables import D, Row, Solver, X, Y, Z, far, nodes, step, table
from diffusion.schedules import Schedule


def heun(grid: NoiseLevel) -> Solver:
    """Heun's method on d(x/alpha) / d(sigma/alpha) = eps (EDM, Karras et al., 2022, alg. 1).

    Order 2, two evaluations a step; the last step is Euler's if it goes to clean data: 2N - 1.
    Steps from sigma/alpha > 1000 are taken in ``flow_heun``'s space.
    """
    steps = pairwise(nodes(grid))
    return table([row for now, after in steps for row in heun_rows(now, after, float(far(now)))])


def flow_heun(grid: NoiseLevel) -> Solver:
    """Heun's method on d(x/s) / d(sigma/s) = eps - D, s = alpha + sigma, the flow's velocity.

    On rectified flow, where s = 1, this is x' = x + (t' - t) (v + v') / 2. Order 2; finite at
    alpha = 0, so that it is the choice for schedules that start there. 2N - 1 evaluations.
    """
    steps = pairwise(nodes(grid))
    return table([row for now, after in steps for row in heun_rows(now, after, kappa=1.0)])


def heun_rows(now: NoiseLevel, after: NoiseLevel, kappa: float) -> list[Row]:
    """One step of Heun's method in the scaling of x that kappa gives; Euler's to clean data."""
    euler = step(X, D, now, after)
    if after.sigma == 0:
        return [Row(now, [euler])]
    s, s_after = now.alpha + kappa * now.sigma, after.alpha + kappa * after.sigma
    half = s_after * (after.sigma / s_after - now.sigma / s) / 2
    base = s_after / s * X + half * (X - s * D) / now.sigma
    return [
        Row(now, [euler, base]),
        Row(after, [Y[1] + half * (X - s_after * D) / after.sigma]),
    ]


def midpoint(grid: NoiseLevel, schedule: Schedule) -> Solver:
    """The explicit midpoint method on the flow's velocity; order 2, 2N evaluations.

    On rectified flow x' = x + (t' - t) v(x + (t' - t)/2 v, (t + t')/2).
    """
    rows = []
    for now, after in pairwise(nodes(grid)):
        middle = sum(level.sigma / (level.alpha + level.sigma) for level in (now, after)) / 2
        rows += _midpoint(now, schedule.at_ratio(middle / (1 - middle)), after, kappa=1.0)
    return table(rows)


def dpm2(grid: NoiseLevel, schedule: Schedule) -> Solver:
    """k-diffusion's DPM2: a midpoint method whose middle is that of log(sigma / alpha).

    As in DPM-Solver-2 (Lu et al., 2022, alg. 1), but the step follows the middle's slope from its
    beginning. Order 2; 2N - 1 evaluations. The step to clean data is Euler's, as is one from
    alpha = 0.
    """
    return dpm2_ancestral(grid, schedule, eta=0.0)


def dpm2_ancestral(
    grid: NoiseLevel, schedule: Schedule, eta: float = 1.0, s_noise: float = 1.0
) -> Solver:
    """k-diffusion's DPM2 ancestral: ``dpm2`` below the next level, and noise up to it.

    The levels and the noise are those of ``euler_ancestral``, the evaluations those of ``dpm2``.
    """

    def stages(now: NoiseLevel, down: NoiseLevel, after: NoiseLevel, std: float) -> list[Row]:
        return _midpoint(now, log_middle(now, down, schedule), down, kappa=0.0, std=std)

    return ancestral_table(grid, eta, s_noise, stages)


def log_middle(now: NoiseLevel, after: NoiseLevel, schedule: Schedule) -> NoiseLevel:
    """The level halfway in log(sigma / alpha), where both are positive."""
    return schedule.at_ratio(np.sqrt(now.ratio * after.ratio))


def _midpoint(
    now: NoiseLevel, middle: NoiseLevel, after: NoiseLevel, kappa: float, std: float = 0.0
) -> list[Row]:
    s, s_middle, s_after = (level.alpha + kappa * level.sigma for level in (now, middle, after))
    gain = s_after * (after.sigma / s_after - now.sigma / s) / middle.sigma
    return [
        Row(now, [step(X, D, now, middle), s_after / s * X]),
        Row(middle, [Y[1] + gain * (X - s_middle * D) + std * Z]),
    ]


def edm(
    grid: NoiseLevel,
    schedule: Schedule,
    churn: float = 40.0,
    low: float = 0.05,
    high: float = 50.0,
    s_noise: float = 1.003,
) -> Solver:
    """EDM's stochastic sampler (Karras et al., 2022, alg. 2): noise is added before each step.

    Where low <= sigma/alpha <= high, noise of standard deviation s_noise raises sigma/alpha by the
    factor 1 + gamma with gamma = min(churn / N, sqrt(2) - 1), and Heun's step starts from there.
    2N - 1 evaluations to clean data. The defaults are those of their table 5 for ImageNet-64;
    churn = 0 is ``heun``.
    """
    check_range("churn", churn, 0)
    check_range("s_noise", s_noise, 0)
    if not 0 <= low <= high:
        raise ValueError(f"expected 0 <= low <= high, got low={low} and high={high}")
    path = nodes(grid)
    gamma = min(churn / (len(path) - 1), np.sqrt(2) - 1)

    def raised(level: NoiseLevel) -> tuple[NoiseLevel, float]:
        """The churned level, and the deviation of the noise up to it where alpha = 1."""
        with np.errstate(divide="ignore"):
            if level.sigma == 0 or not low <= level.ratio <= high or gamma == 0:
                return level, 0.0
        ratio = level.ratio * (1 + gamma)
        return schedule.at_ratio(ratio), s_noise * np.sqrt(ratio**2 - level.ratio**2)

    rows = []
    start, _ = raised(path[0])  # the initial noise is of the raised level
    for after in path[1:]:
        rows += heun_rows(start, after, float(far(start)))
        if after is path[-1]:
            break
        start, std = raised(after)
        if std > 0:
            scale = start.alpha / after.alpha
            new = scale * rows[-1].registers[0] + start.alpha * std * Z
            rows[-1] = Row(rows[-1].level, [new])
    return table(rows)
