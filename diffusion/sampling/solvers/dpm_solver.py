"""DPM-Solver, DPM-Solver++ and their SDE forms: exponential integrators in lambda.

With lambda = log(alpha/sigma) and h = lambda' - lambda, the probability-flow ODE (eta = 0) and the
reverse SDE (eta = 1) are solved exactly but for one integral (Lu et al., 2022, prop. 3.1; 2022b,
prop. 4.1 and section 5), in data prediction ("++")

    x' = e^{-eta h} (sigma'/sigma) x + alpha' int_0^h c e^{-c (h - v)} D(lambda + v) dv
         + sigma' sqrt(1 - e^{-2 eta h}) z,                                           c = 1 + eta

or in noise prediction

    x' = (alpha'/alpha) x - c sigma' int_0^h e^{h - v} eps(lambda + v) dv
         + sigma' sqrt(eta (e^{2h} - 1)) z                                      (eta = 0 or 1).

A polynomial, d0 + (v/h) d1 + (v/h)^2 d2 / 2, replaces D (or eps) in the integral. It goes through
earlier evaluations ("multistep") or through those of a block of steps ("singlestep"). There are two
kinds of order 2: "heun" integrates d1 exactly, "midpoint" takes it at v = h/2.

A step that starts at alpha = 0 or ends at sigma = 0 has h = inf and order 1. Where data are a
point, one step of order 1 of the SDE in noise prediction leaves 2 e^{2h} - 4 e^h + 3 times the
right variance, and with h > log 3 errors grow from step to step: a step longer than ``longest``, or
from sigma/alpha > 1000, is that of data prediction with order 1, whose variance is right for every
h. ``dpm_solver`` has longest = 1/2.

High orders extrapolate, and err where a step in lambda is much longer than the one before, as at
the end of the grids ``leading`` and ``linspace`` on most schedules. With ``jump``, a step uses no
estimate from before one that is shorter than 1 / ``jump`` of it, and no block of ``singlestep``
holds both. Gaussian data of deviation 0.5 get these deviations, with N steps on ``linear``; in
brackets k-diffusion's formulas, which have half the second difference in order 3:

    grid, N             2M             3M             3M SDE         jump=2: 2M      3M  3M SDE
    leading, 20       0.61 (0.61)    0.32 (0.47)    2.94 (1.84)          0.48    0.48    0.53
    leading, 40       0.54 (0.54)    0.39 (0.45)    1.66 (1.02)          0.50    0.50    0.54
    karras, 40        0.51 (0.51)    0.50 (0.50)    0.50 (0.51)          0.51    0.50    0.50

``uniform``, ``karras`` and ``exponential`` do not need it. It does not help where all steps are
long: with 10 steps of ``karras`` the 3M SDE gives 1.23 (1.05), the 2M SDE 0.53.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from diffusion.errors import check_range
from diffusion.levels import NoiseLevel
from diffusion.sampling.solvers.one_step import ancestral, ancestral_table
from diffusion.sampling.solvers.runge_kutta import log_middle
from diffusion.sampling.tables import (
    Combination,
    D,
    Row,
    Solver,
    X,
    Y,
    Z,
    check_choice,
    check_entries,
    estimate,
    far,
    log_ratio,
    nodes,
    steady_orders,
    step,
    table,
)
from diffusion.schedules import Schedule


def dpmpp_2m(grid: NoiseLevel, kind: str = "midpoint", jump: float = math.inf) -> Solver:
    """DPM-Solver++ 2M: order 2, multistep, data prediction (Lu et al., 2022b, alg. 2).

    N evaluations. The first step has order 1, as has the last if it goes to clean data, and the
    second if the grid starts at alpha = 0.
    """
    return multistep(grid, 2, kind=kind, jump=jump)


def dpmpp_3m(grid: NoiseLevel, jump: float = math.inf) -> Solver:
    """DPM-Solver++ 3M: order 3, multistep, data prediction; N evaluations.

    The second difference has the factor 2, which the published code lacks (see ``multistep``).
    """
    return multistep(grid, 3, jump=jump)


def dpmpp_2m_sde(
    grid: NoiseLevel, kind: str = "midpoint", eta: float = 1.0, jump: float = math.inf
) -> Solver:
    """SDE-DPM-Solver++ 2M (Lu et al., 2022b, section 5); N evaluations.

    eta scales the noise, as in k-diffusion; eta = 0 is ``dpmpp_2m``.
    """
    return multistep(grid, 2, kind=kind, eta=eta, jump=jump)


def dpmpp_3m_sde(grid: NoiseLevel, eta: float = 1.0, jump: float = math.inf) -> Solver:
    """k-diffusion's DPM-Solver++(3M) SDE, but for the factor in ``dpmpp_3m``; N evaluations."""
    return multistep(grid, 3, kind="heun", eta=eta, jump=jump)


def dpm_solver(
    grid: NoiseLevel,
    order: int = 2,
    kind: str = "midpoint",
    eta: float = 0.0,
    jump: float = math.inf,
) -> Solver:
    """DPM-Solver in its multistep form: noise prediction, orders 1 to 3; N evaluations.

    eta = 1 is the SDE's form, in orders 1 and 2. There, steps of more than 1/2 in lambda are those
    of data prediction: 2 of 20 and 9 of 10 on ``linear`` with the grid ``uniform``.
    """
    options = {"kind": kind, "eta": eta, "jump": jump, "longest": 0.5}
    return multistep(grid, order, prediction="eps", **options)


def dpm_solver_singlestep(
    grid: NoiseLevel, order: int = 3, kind: str = "midpoint", jump: float = math.inf
) -> Solver:
    """DPM-Solver-2 and -3 (Lu et al., 2022, alg. 1 and 2): singlestep, noise prediction.

    Blocks of ``order`` steps, with N evaluations in all (see ``singlestep``).
    """
    return singlestep(grid, order, prediction="eps", kind=kind, jump=jump)


def dpmpp_2s(
    grid: NoiseLevel, kind: str = "midpoint", eta: float = 0.0, jump: float = math.inf
) -> Solver:
    """DPM-Solver++ 2S: singlestep, order 2, data prediction (Lu et al., 2022b, alg. 1).

    Blocks of two steps, the first of which is the stage; N evaluations. eta = 1 is the SDE's form.
    """
    return singlestep(grid, 2, kind=kind, eta=eta, jump=jump)


def dpmpp_3s(grid: NoiseLevel, kind: str = "midpoint", jump: float = math.inf) -> Solver:
    """DPM-Solver++ 3S: singlestep, order 3, data prediction, in blocks of three steps."""
    return singlestep(grid, 3, kind=kind, jump=jump)


def multistep(
    grid: NoiseLevel,
    order: int,
    *,
    prediction: str = "x0",
    kind: str = "midpoint",
    eta: float = 0.0,
    orders: Sequence[int] | None = None,
    curvature: float = 2.0,
    rising: bool = False,
    jump: float = math.inf,
    longest: float = math.inf,
) -> Solver:
    """The multistep family: N evaluations; each step uses the results of the last ``order`` ones.

    Args:
      order: 1 to 3.
      prediction: "x0" (DPM-Solver++) or "eps" (DPM-Solver).
      kind: of second-order steps, "midpoint" or "heun". Third-order steps have one kind.
      eta: share of the reverse SDE's noise, 0 for the ODE; 0 or 1 in noise prediction, which with
        1 has no order 3.
      orders: [N] the order of each step instead of ``order``, as far as the history allows.
      curvature: factor of the second difference in third-order steps. 2 makes it the second
        derivative; the published code, diffusers and k-diffusion have 1, and so order 2.
      rising: whether the grid goes from less to more noise (inversion); eta must then be 0.
      jump, longest: > 0; see above.
    """
    _check(order, prediction, kind, eta)
    if rising and eta:
        raise ValueError(f"eta must be 0 on a rising grid, got {eta}")
    path = nodes(grid, rising)
    lam = [log_ratio(level) for level in path]
    orders = [order] * (len(path) - 1) if orders is None else orders
    check_entries("orders", orders, path)
    near = steady_orders(lam, jump)
    rows = []
    for i, (now, after) in enumerate(pairwise(path)):
        h = lam[i + 1] - lam[i]
        known = sum(np.isfinite(lam[max(i - 2, 0) : i + 1]))  # evaluations at finite lambda
        k = min(orders[i], near[i], known) if np.isfinite(h) else 1
        m0 = estimate(now, prediction)
        if prediction == "eps" and eta and (h > longest or np.isinf(h) or far(now)):
            rows.append(Row(now, [_advance(X, now, after, [D], "x0", kind, eta), m0, Y[1]]))
            continue
        d = [m0]
        if k > 1:
            r0 = (lam[i] - lam[i - 1]) / h
            d.append((m0 - Y[1]) / r0)
        if k > 2:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            second = (d[1] - (Y[1] - Y[2]) / r1) / (r0 + r1)
            d = [m0, d[1] + r0 * second, curvature * second]
        new = _advance(X, now, after, d, prediction, kind if k == 2 else "heun", eta)
        rows.append(Row(now, [new, m0, Y[1]]))
    return table(rows)


def singlestep(
    grid: NoiseLevel,
    order: int,
    *,
    prediction: str = "x0",
    kind: str = "midpoint",
    eta: float = 0.0,
    orders: Sequence[int] | None = None,
    jump: float = math.inf,
) -> Solver:
    """The singlestep family: blocks of ``order`` steps, whose inner nodes are the stages.

    N evaluations for N steps: the j-th step of a block starts again from the block's first node,
    with order j. An incomplete block at the end has a lower order, as has a step from alpha = 0 or
    to sigma = 0 and, in noise prediction, from sigma/alpha > 1000. DPM-Solver's "fast" variant and
    diffusers do the same.

    Args:
      grid: N + 1 levels. Where lambda is evenly spaced, stages lie at 1/2, or 1/3 and 2/3.
      order: 1 to 3.
      prediction, kind, eta, jump: as in ``multistep``; third-order steps have both kinds, and eta
        must be 0 in noise prediction.
      orders: [N] other blocks than these, each counting up from 1, as in 1, 2, 3, 1, 2, 1.
    """
    _check(order, prediction, kind, eta)
    path = nodes(grid)
    lam = [log_ratio(level) for level in path]
    if prediction == "eps" and eta:
        raise ValueError(f"eta must be 0 in noise prediction, got {eta}; multistep has eta=1")
    if orders is None:
        orders, near = [], steady_orders(lam, jump)
        for i in range(len(path) - 1):
            first = i - (orders[-1] if orders else 0)
            infinite = not np.isfinite(lam[i + 1] - lam[first])
            infinite |= prediction == "eps" and far(path[first])
            again = not orders or orders[-1] == order or infinite or near[i] <= orders[-1]
            orders.append(1 if again else orders[-1] + 1)
    check_entries("orders", orders, path)
    rows = []
    for i, (now, after) in enumerate(pairwise(path)):
        k = orders[i]
        if k > 1 and k != orders[i - 1] + 1:
            raise ValueError(f"orders must count up from 1 in each block, got {list(orders)}")
        m0 = estimate(now, prediction)
        if k == 1:
            rows.append(Row(now, [_advance(X, now, after, [m0], prediction, kind, eta), X, m0]))
            continue
        first = i - k + 1
        h = lam[i + 1] - lam[first]
        r0 = (lam[i] - lam[first]) / h
        newest = (m0 - Y[2]) / r0
        d = [Y[2], newest]
        if k == 3 and kind == "heun":
            r1 = (lam[i - 1] - lam[first]) / h
            older = (Y[3] - Y[2]) / r1
            d = [Y[2], (r0 * older - r1 * newest) / (r0 - r1), 2 * (newest - older) / (r0 - r1)]
        new = _advance(Y[1], path[first], after, d, prediction, kind if k == 2 else "heun", eta)
        rows.append(Row(now, [new, Y[1], Y[2], m0]))
    return table(rows)


def dpmpp_2s_ancestral(
    grid: NoiseLevel, schedule: Schedule, eta: float = 1.0, s_noise: float = 1.0
) -> Solver:
    """k-diffusion's DPM-Solver++(2S) ancestral: a 2S step below the next level, and noise up to it.

    Order 2 for eta = 0. 2N - 1 evaluations: two a step, one for the step to clean data.
    """

    def stages(now: NoiseLevel, down: NoiseLevel, after: NoiseLevel, std: float) -> list[Row]:
        middle = log_middle(now, down, schedule)
        return [
            Row(now, [step(X, D, now, middle), X]),
            Row(middle, [step(Y[1], D, now, down) + std * Z]),
        ]

    return ancestral_table(grid, eta, s_noise, stages)


def dpmpp_sde(
    grid: NoiseLevel, schedule: Schedule, eta: float = 1.0, s_noise: float = 1.0
) -> Solver:
    """k-diffusion's DPM-Solver++ SDE: singlestep with noise in its stage; 2N - 1 evaluations.

    The stage's noise is a part of the step's: both are increments of one Brownian path whose time
    is sigma / alpha.
    """

    def stages(now: NoiseLevel, down: NoiseLevel, after: NoiseLevel, std: float) -> list[Row]:
        middle = log_middle(now, after, schedule)
        stage, up_stage = ancestral(now, middle, eta)
        share = np.sqrt((now.ratio - middle.ratio) / (now.ratio - after.ratio))
        staged = step(X, D, now, stage) + s_noise * up_stage * Z
        rest = std * np.sqrt(1 - share**2)
        return [
            Row(now, [staged, X, std * share * Z]),
            Row(middle, [step(Y[1], D, now, down) + Y[2] + rest * Z]),
        ]

    return ancestral_table(grid, eta, s_noise, stages)


def _advance(
    x: Combination,
    now: NoiseLevel,
    after: NoiseLevel,
    d: list[Combination],
    prediction: str,
    kind: str,
    eta: float,
) -> Combination:
    """The module's formulas, for d = [d0], [d0, d1] or [d0, d1, d2]."""
    h = log_ratio(after) - log_ratio(now)
    if prediction == "x0":
        u = (1 + eta) * h
        decay = (now.alpha * after.sigma / (after.alpha * now.sigma)) ** eta if eta else 1.0
        first = after.alpha * -np.expm1(-u)
        new = decay * after.sigma / now.sigma * x + first * d[0]
        std = after.sigma * np.sqrt(-np.expm1(-2 * eta * h)) if eta else 0.0
        if len(d) > 1:
            second = after.alpha * (np.expm1(-u) / u + 1)
            new = new + (second if kind == "heun" else first / 2) * d[1]
        if len(d) > 2:
            new = new - after.alpha * ((np.expm1(-u) + u) / u**2 - 0.5) * d[2]
        return new + std * Z
    if now.alpha == 0:
        return step(X, D, now, after)
    grow = after.alpha * now.sigma / now.alpha - after.sigma  # sigma' (e^h - 1)
    new = after.alpha / now.alpha * x - (1 + eta) * grow * d[0]
    if len(d) > 1:
        second = grow / h - after.sigma
        new = new - (1 + eta) * (second if kind == "heun" else grow / 2) * d[1]
    if len(d) > 2:
        new = new - ((grow - after.sigma * h) / h**2 - 0.5 * after.sigma) * d[2]
    variance = (after.alpha * now.sigma / now.alpha) ** 2 - after.sigma**2
    return new + np.sqrt(eta * variance) * Z


def _check(order: int, prediction: str, kind: str, eta: float) -> None:
    check_choice("order", order, (1, 2, 3))
    check_choice("prediction", prediction, ("x0", "eps"))
    check_choice("kind", kind, ("midpoint", "heun"))
    if prediction == "x0":
        check_range("eta", eta, 0)
    if prediction == "eps" and eta not in (0, 1):
        raise ValueError(f"eta must be 0 or 1 in noise prediction, got {eta}")
    if prediction == "eps" and eta and order == 3:
        raise ValueError("noise prediction with eta=1 has orders 1 and 2, got order=3")
