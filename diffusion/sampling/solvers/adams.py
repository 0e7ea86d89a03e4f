"""Linear multistep solvers in eps: a polynomial through the last few evaluations, integrated.

In the ratio rho = sigma/alpha the probability-flow ODE is d(x/alpha)/d rho = eps, so that

    x'/alpha' = x/alpha + int_rho^rho' eps(r) dr.

The methods differ in the variable in which eps is a polynomial, and in how they start. N steps are
N evaluations unless a docstring states another number. A step from alpha = 0, which has no ratio,
is Euler's, and the method starts after it. The first steps have lower orders: the whole has order 2
where all steps are alike, and the order of the method where the first few are short. Last steps
that are long in log(alpha/sigma), for which other solvers have ``jump``, are short in rho.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from diffusion.errors import check_range
from diffusion.levels import NoiseLevel
from diffusion.sampling.tables import (
    Combination,
    D,
    Row,
    Solver,
    X,
    Y,
    check_choice,
    check_entries,
    eps,
    eps_step,
    far,
    nodes,
    step,
    table,
)
from diffusion.schedules import Schedule

BASHFORTH = [
    [1.0],
    [3 / 2, -1 / 2],
    [23 / 12, -16 / 12, 5 / 12],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
]
"""Weights of the derivatives, newest first, where the steps are even (Adams-Bashforth)."""


def lms(grid: NoiseLevel, order: int = 4) -> Solver:
    """k-diffusion's LMS: Adams-Bashforth with uneven steps, eps a polynomial in sigma/alpha.

    It is the same as DEIS's rho-AB (Zhang & Chen, 2022). Orders 1 to 4.
    """

    def weights(path: list[NoiseLevel], i: int, k: int) -> np.ndarray:
        ratio = np.array([level.ratio for level in path[i + 1 - k : i + 2]])
        return lagrange_integrals(ratio[-2::-1], ratio[-2], ratio[-1])

    return _adams(grid, order, weights)


def deis(grid: NoiseLevel, order: int = 3, orders: Sequence[int] | None = None) -> Solver:
    """DEIS with eps a polynomial in log(sigma/alpha) (Zhang & Chen, 2022; diffusers' "logrho").

    Orders 1 to 4; the last step has order 1 if it goes to clean data. ``orders`` [N] lowers the
    order of single steps.
    """

    def weights(path: list[NoiseLevel], i: int, k: int) -> np.ndarray:
        ratio = np.array([level.ratio for level in path[i + 1 - k : i + 2]])
        if ratio[-1] == 0:
            return np.array([-ratio[-2]])
        u = np.log(ratio)
        return ratio[-1] * lagrange_integrals(u[-2::-1], u[-2], u[-1], rate=1.0)

    return _adams(grid, order, weights, orders)


def ipndm(grid: NoiseLevel, order: int = 4) -> Solver:
    """iPNDM: Adams-Bashforth with the weights of even steps, in sigma/alpha (Zhang & Chen, 2022).

    Orders 1 to 4. Order 2 on smooth grids; a higher one helps only where sigma/alpha is nearly
    evenly spaced.
    """

    def weights(path: list[NoiseLevel], i: int, k: int) -> np.ndarray:
        return (path[i + 1].ratio - path[i].ratio) * np.array(BASHFORTH[k - 1])

    return _adams(grid, order, weights)


def gradient_estimation(grid: NoiseLevel, gamma: float = 2.0) -> Solver:
    """Euler's step along gamma eps + (1 - gamma) eps_previous (Permenter & Yuan, 2024, alg. 2).

    With gamma = 2 a step takes the last evaluation's error back; gamma = 1 is Euler's method, 3/2
    is Adams-Bashforth's of order 2 on even steps. Order 1.
    """
    check_range("gamma", gamma)
    rows, known = [], False
    for now, after in pairwise(nodes(grid)):
        if now.alpha == 0:
            rows.append(Row(now, [step(X, D, now, after)]))
            continue
        e = eps(now)
        mix = gamma * e + (1 - gamma) * Y[1] if known else e
        rows.append(Row(now, [eps_step(X, mix, now, after), e]))
        known = True
    return table(rows)


def plms(grid: NoiseLevel) -> Solver:
    """PNDM without Runge-Kutta start, Stable Diffusion's PLMS (Liu et al., 2022).

    It is ``ipndm`` of order 4, but takes the first step twice, the second time with the mean of the
    derivatives at both of its ends: N + 1 evaluations, or N if the grid has only one step. Steps
    from sigma/alpha > 1000 are Euler's, and the method starts after them. Order 2.
    """
    path = nodes(grid)
    rows, k = [], 0
    for i, (now, after) in enumerate(pairwise(path)):
        if far(now):
            rows.append(Row(now, [step(X, D, now, after)]))
            continue
        e, k = eps(now), min(k + 1, 4)
        if k == 1 and i + 2 < len(path):  # Y: base point, then the derivatives
            rows.append(Row(now, [step(X, D, now, after), X, e]))
            again = eps_step(Y[1], (Y[2] + eps(after)) / 2, now, after)
            rows.append(Row(after, [again, Y[2]]))
            continue
        rows.append(Row(now, [eps_step(X, _mix(e, k), now, after), e, Y[1], Y[2]]))
    return table(rows)


def pndm(grid: NoiseLevel, schedule: Schedule) -> Solver:
    """PNDM with its Runge-Kutta start (Liu et al., 2022, alg. 2): the F-PNDM of the paper.

    The first three steps are those of the classical Runge-Kutta method, whose stages lie halfway in
    time; the others are those of ``ipndm``. N + 9 evaluations for N >= 3, or for N >= 4 if the last
    step goes to clean data. Order 4 where sigma/alpha is evenly spaced, else 2.
    """
    path = nodes(grid)
    rows, k = [], 0
    for now, after in pairwise(path):
        if far(now) or (after.sigma == 0 and k < 3):  # nothing is evaluated at clean data
            rows.append(Row(now, [step(X, D, now, after)]))
            continue
        if k == 3:
            e = eps(now)
            rows.append(Row(now, [eps_step(X, _mix(e, 4), now, after), e, Y[1], Y[2]]))
            continue
        middle = schedule((schedule.argument(now) + schedule.argument(after)) / 2)
        k += 1
        # Y[1:4] hold the derivatives at the nodes, newest first; Y[4] the base, Y[5] the sum.
        e = eps(now)
        rows.append(Row(now, [eps_step(X, e, now, middle), e, Y[1], Y[2], X, e / 6]))
        e = eps(middle)
        kept = [Y[1], Y[2], Y[3], Y[4], Y[5] + e / 3]
        rows.append(Row(middle, [eps_step(Y[4], e, now, middle), *kept]))
        rows.append(Row(middle, [eps_step(Y[4], e, now, after), *kept]))
        mix = Y[5] + eps(after) / 6
        rows.append(Row(after, [eps_step(Y[4], mix, now, after), Y[1], Y[2], Y[3]]))
    return table(rows)


def lagrange_integrals(
    points: np.ndarray, start: float, end: float, rate: float = 0.0
) -> np.ndarray:
    """int_start^end e^{rate (u - end)} L_j(u) du of the Lagrange polynomials L_j over points [k].

    By Gauss-Legendre quadrature, to rounding for |rate (end - start)| up to about 50.
    """
    z, w = _GAUSS
    u = start + (z + 1) / 2 * (end - start)
    basis = np.ones((len(points), len(u)))
    for j, point in enumerate(points):
        for other in np.delete(points, j):
            basis[j] *= (u - other) / (point - other)
    return basis @ (w * np.exp(rate * (u - end))) * (end - start) / 2


_GAUSS = np.polynomial.legendre.leggauss(64)


def _adams(
    grid: NoiseLevel,
    order: int,
    weights: Callable[[list[NoiseLevel], int, int], np.ndarray],
    orders: Sequence[int] | None = None,
) -> Solver:
    """x'/alpha' = x/alpha + sum_j weights_j eps_j, newest first; weights(path, i, k) -> [k]."""
    check_choice("order", order, (1, 2, 3, 4))
    path = nodes(grid)
    if orders is not None:
        check_entries("orders", orders, path)
    rows, known = [], 0
    for i, (now, after) in enumerate(pairwise(path)):
        if now.alpha == 0:
            rows.append(Row(now, [step(X, D, now, after)]))
            continue
        known = min(known + 1, order)
        past = [eps(now), *Y[1:4]]
        new = after.alpha / now.alpha * X
        k = known if orders is None else min(known, orders[i])
        for weight, e in zip(weights(path, i, k), past):
            new = new + after.alpha * weight * e
        rows.append(Row(now, [new, *past[:3]]))
    return table(rows)


def _mix(newest: Combination, k: int) -> Combination:
    """The newest derivative and those in Y[1:], weighted for even steps of order k."""
    return sum(w * e for w, e in zip(BASHFORTH[k - 1], [newest, *Y[1:4]]))
