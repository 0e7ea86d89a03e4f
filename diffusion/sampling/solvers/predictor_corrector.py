"""Multistep predictors whose evaluation also corrects the step that led to it.

A row evaluates at the predicted x, corrects x by the result, and predicts the next x from there:
one evaluation a step. All terms of the correction but the last are known before that evaluation;
their sum is in the register Y[1]. Y[2:] are the earlier estimates, newest first.

A step that starts at alpha = 0 or ends at sigma = 0 has order 1 and is not corrected; in noise
prediction, neither is one from sigma/alpha > 1000.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import factorial

import numpy as np

from diffusion.errors import check_range
from diffusion.levels import NoiseLevel
from diffusion.sampling.solvers.adams import lagrange_integrals
from diffusion.sampling.tables import (
    REGISTERS,
    Combination,
    D,
    Row,
    Solver,
    X,
    Y,
    Z,
    check_choice,
    check_entries,
    eps_step,
    estimate,
    far,
    log_ratio,
    nodes,
    steady_orders,
    step,
    table,
)

HISTORY = REGISTERS - 2  # the earlier estimates that fit into the registers


def unipc(
    grid: NoiseLevel,
    order: int = 2,
    kind: str = "bh2",
    prediction: str = "x0",
    *,
    orders: Sequence[int] | None = None,
    corrected: Sequence[bool] | None = None,
    jump: float = math.inf,
) -> Solver:
    """UniPC (Zhao et al., 2023, alg. 5 to 8): N evaluations; the corrector adds one to the order.

    Let h be the step in log(alpha/sigma), r_k the places of the earlier estimates in units of h,
    and D_k their differences to the newest. Then

        x' = (first order) - alpha' B(h) sum_k rho_k D_k / r_k,

    where the rho solve sum_k rho_k r_k^{n-1} = n! h phi_{n+1}(h) / B(h).

    Args:
      order: of the predictor, 1 to 4.
      kind: B(h) = h ("bh1") or e^h - 1 ("bh2").
      prediction: "x0" or "eps".
      orders: [N] the order of each step instead of ``order``, as far as the history allows.
      corrected: [N] whether each step is corrected; by default every step that can be.
      jump: a step more than this times as long as an earlier one, in log(alpha/sigma), does not
        use the estimate before that (see ``dpm_solver``) nor, in eps, is it corrected.
    """
    check_choice("order", order, (1, 2, 3, 4))
    check_choice("kind", kind, ("bh1", "bh2"))
    check_choice("prediction", prediction, ("x0", "eps"))
    path = nodes(grid)
    lam = np.array([log_ratio(level) for level in path])
    count = len(path) - 1
    orders = [order] * count if orders is None else orders
    corrected = [True] * count if corrected is None else corrected
    check_entries("orders", orders, path)
    check_entries("corrected", corrected, path)
    near = steady_orders(lam, jump)
    sign = -1 if prediction == "x0" else 1

    def advance(i: int, x: Combination, past: list[Combination]):
        now, after = path[i], path[i + 1]
        h = lam[i + 1] - lam[i]
        known = i + 1 - int(not np.isfinite(lam[0]))
        k = min(orders[i], near[i], known)
        # A correction in eps at the end of a long step would be larger than x.
        long = prediction == "eps" and near[i] < min(max(orders[i], 2), known)
        if now.alpha == 0 and prediction == "eps":
            return step(x, D, now, after), None
        first = (step if prediction == "x0" else eps_step)(x, past[0], now, after)
        if not np.isfinite(h):
            return first, None
        hh = sign * h
        scale = np.expm1(hh) if kind == "bh2" else hh
        size = after.alpha if prediction == "x0" else after.sigma
        r = np.array([*((lam[i - j] - lam[i]) / h for j in range(1, k)), 1.0])
        b = np.array([factorial(n) * _phi(n + 1, hh) * hh / scale for n in range(1, k + 1)])
        R = np.vander(r, increasing=True).T  # R[n, k] = r_k^n
        differences = [(m - past[0]) / place for m, place in zip(past[1:], r[:-1])]
        predict = np.array([0.5]) if k == 2 else np.linalg.solve(R[:-1, :-1], b[:-1])
        correct = np.array([0.5]) if k == 1 else np.linalg.solve(R, b)
        new = first - size * scale * _dot(predict, differences)
        partial = first - size * scale * (_dot(correct, differences) - correct[-1] * past[0])
        if long or not corrected[i]:
            return new, None
        return new, (partial, -size * scale * correct[-1])

    return _predict_correct(path, advance, prediction)


def sa_solver(
    grid: NoiseLevel,
    tau: float = 1.0,
    low: float = 0.05,
    high: float = 1.0,
    predictor_order: int = 3,
    corrector_order: int = 4,
    jump: float = math.inf,
) -> Solver:
    """SA-Solver (Xue et al., 2023, alg. 1): stochastic Adams methods; N evaluations.

    It solves the SDE with tau >= 0 times the reverse SDE's noise where low <= sigma/alpha <= high,
    and the ODE (tau = 0) elsewhere. The defaults are those of the paper's appendix E for pixels;
    for ``jump`` see ``dpm_solver``.
    """
    check_range("tau", tau, 0)
    if not 0 <= low <= high:
        raise ValueError(f"expected 0 <= low <= high, got low={low} and high={high}")
    start = nodes(grid)[:-1]
    taus = [tau if low * a.alpha <= a.sigma <= high * a.alpha else 0.0 for a in start]
    orders = [predictor_order] * len(start), [corrector_order] * len(start)
    return stochastic_adams(grid, taus, *orders, simplified=False, jump=jump)


def stochastic_adams(
    grid: NoiseLevel,
    taus: Sequence[float],
    predictor_orders: Sequence[int],
    corrector_orders: Sequence[int],
    *,
    prediction: str = "x0",
    simplified: bool = True,
    jump: float = math.inf,
    longest: float | None = None,
) -> Solver:
    """SA-Solver with a tau and two orders for each step, [N] each.

    The estimate is a polynomial through ``order`` evaluations, in lambda = log(alpha/sigma),
    integrated exactly with the noise (Xue et al., 2023, eq. 14 and 17):

        x' = (sigma'/sigma) e^{-tau^2 h} x + (1 + tau^2) sigma' e^{-tau^2 lambda'}
             int e^{(1 + tau^2) l} D(l) dl + sigma' sqrt(1 - e^{-2 tau^2 h}) z.

    Orders, 1 to 4 of the predictor and 1 to 5 of the corrector, are lowered to what the history
    allows. In noise prediction with tau > 0, high orders need short steps: one of more than
    ``longest`` in lambda, by default 0.5 / the highest order, or from sigma/alpha > 1000, is that
    of data prediction with order 1 (see ``dpm_solver``). With ``simplified``, second-order steps
    take h^2 / 2 for the integral over the difference, int e^{...} (l - lambda) dl, as the published
    code does; the order is the same.
    """
    both = (("predictor", predictor_orders, HISTORY), ("corrector", corrector_orders, HISTORY + 1))
    for name, orders, highest in both:
        if not all(1 <= k <= highest for k in orders):
            raise ValueError(f"{name} orders must lie in 1..{highest}, got {list(orders)}")
    check_choice("prediction", prediction, ("x0", "eps"))
    path = nodes(grid)
    check_entries("taus", taus, path)
    for name, orders, _ in both:
        check_entries(f"{name} orders", orders, path)
    lam = np.array([log_ratio(level) for level in path])
    if longest is None:
        longest = 0.5 / max(2, *predictor_orders, *corrector_orders)
    skipped, near = int(not np.isfinite(lam[0])), steady_orders(lam, jump)

    def weights(points: np.ndarray, i: int) -> np.ndarray:
        """The weights of the estimates at these lambdas, in the step from node i."""
        after, tau2, h = path[i + 1], taus[i] ** 2, lam[i + 1] - lam[i]
        if prediction == "eps":
            c = lagrange_integrals(points, lam[i], lam[i + 1], rate=-1.0)
            return -(1 + tau2) * after.sigma * c
        rate = 1 + tau2
        c = rate * after.alpha * lagrange_integrals(points, lam[i], lam[i + 1], rate=rate)
        if simplified and len(points) == 2:
            # e^{-rate lambda'} int e^{rate l} (l - lambda) dl is replaced by h^2 / 2.
            exact = (h * rate + np.expm1(-rate * h)) / rate**2
            moved = rate * after.alpha * (h**2 / 2 - exact) / (points[0] - points[1])
            c = c + np.array([moved, -moved])
        return c

    def advance(i: int, x: Combination, past: list[Combination]):
        now, after, tau2 = path[i], path[i + 1], taus[i] ** 2
        h = lam[i + 1] - lam[i]
        finite, noise_prediction = np.isfinite(h), prediction == "eps"
        if noise_prediction and tau2 and (h > longest or not finite or far(now)):
            finite = noise_prediction = False
        if noise_prediction and now.alpha == 0:
            return step(x, D, now, after), None
        if noise_prediction:
            grow = after.alpha / now.alpha
            keep, std = grow, taus[i] * np.sqrt(max((grow * now.sigma) ** 2 - after.sigma**2, 0))
        else:
            decay = (now.alpha * after.sigma / (after.alpha * now.sigma)) ** tau2 if tau2 else 1.0
            keep = decay * after.sigma / now.sigma
            std = after.sigma * np.sqrt(-np.expm1(-2 * tau2 * h)) if tau2 else 0.0
        if not finite and noise_prediction:
            return eps_step(x, past[0], now, after), None
        if not finite:
            return keep * x + (after.alpha - keep * now.alpha) * D + std * Z, None
        known = min(i + 1 - skipped, near[i])
        k = min(predictor_orders[i], known)
        new = keep * x + std * Z + _dot(weights(lam[i::-1][:k], i), past)
        k = min(corrector_orders[i], known + 1)
        c = weights(lam[i + 1 :: -1][:k], i)
        partial = keep * x + std * Z + _dot(c[1:], past)
        return new, (partial, c[0])

    return _predict_correct(path, advance, prediction)


Advance = Callable[
    [int, Combination, list[Combination]],
    tuple[Combination, tuple[Combination, float] | None],
]
"""(i, x, estimates newest first) -> (predicted x', correction), where the correction is the pair
(sum of all terms but the last, factor of the last), or None for no correction."""


def _predict_correct(path: list[NoiseLevel], advance: Advance, prediction: str) -> Solver:
    rows, weight = [], None
    for i, now in enumerate(path[:-1]):
        newest = estimate(now, prediction)
        x = X if weight is None else Y[1] + weight * newest
        past = [newest, *Y[2:]]
        new, correction = advance(i, x, past)
        if prediction == "eps" and far(now):
            correction = None
        partial, weight = (np.zeros_like(X), None) if correction is None else correction
        rows.append(Row(now, [new, partial, *past[:HISTORY]]))
    return table(rows)


def _phi(n: int, z: float) -> float:
    """phi_n(z) = (e^z - sum_{k<n} z^k / k!) / z^n, by its series where that cancels."""
    if abs(z) < 1:
        return sum(z**k / factorial(k + n) for k in range(24))
    return (np.exp(z) - sum(z**k / factorial(k) for k in range(n))) / z**n


def _dot(weights: np.ndarray, combinations: Sequence[Combination]) -> Combination:
    return sum((w * c for w, c in zip(weights, combinations)), np.zeros_like(X))
