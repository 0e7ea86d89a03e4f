"""The common parts of the classes in lambda = log(alpha/sigma): grids, orders, the result.

Their x is variance preserving, as ours. With use_flow_sigmas they run on the rectified flow,
alpha = 1 - sigma, and the network receives floor(T sigma).
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np

from diffusion.denoiser import ddpm_index
from diffusion.levels import NoiseLevel
from diffusion.pretrained.schedulers import scheduler, timesteps
from diffusion.pretrained.schedulers.flows import shifted
from diffusion.pretrained.schedulers.scheduler import Request, Sampler
from diffusion.sampling.tables import Solver
from diffusion.schedules import RectifiedFlow


def lambda_grid(
    c: SimpleNamespace, r: Request, rounded: str, repeat: bool = False
) -> tuple[NoiseLevel, np.ndarray, scheduler.LogTable | RectifiedFlow]:
    """(grid, timesteps [N], schedule) of DPM, DEIS and SA.

    Exponential and beta sigmas go with timesteps that are cut off: whether the first is T - 1 or
    T - 2 hangs on the last bit of float32's logarithm and root, in diffusers as here.

    ``rounded``: which spreads have rounded timesteps (others are cut off): "karras", or "but
    cosine": karras and lu, except with squaredcos_cap_v2. ``repeat``: where the sigmas are spread,
    the last is repeated instead of final_sigmas_type.
    """
    spreads = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    used = [field for field in spreads if getattr(c, field, False)]
    if r.timesteps is not None and (used or c.use_flow_sigmas):
        raise ValueError(f"timesteps: not with {(used or ['use_flow_sigmas'])[0]}=True")
    if used and c.use_flow_sigmas:
        raise ValueError(f"use_flow_sigmas: diffusers ignores it with {used[0]}=True")
    if r.mu is not None and not (c.use_dynamic_shifting and c.time_shift_type == "exponential"):
        raise ValueError("mu: needs use_dynamic_shifting=True and time_shift_type='exponential'")
    products = scheduler.alphas_cumprod(c, floor=True)
    schedule, total, steps = scheduler.table_of(products), c.num_train_timesteps, r.count
    sigma = timesteps.ratios(products)
    if c.use_flow_sigmas:
        shift = c.flow_shift if r.mu is None else float(np.exp(r.mu))
        sigmas = shifted((1 - np.linspace(1, 1 / total, steps + 1))[:0:-1], shift, None)
        index = sigmas * total
    elif getattr(c, "use_lu_lambdas", False):
        logs = np.log(sigma)
        sigmas = np.exp(np.linspace(float(logs[-1]), float(logs[0]), steps))
        index = timesteps.log_times(sigmas, products)
    elif used:
        sigmas = timesteps.spread(c, float(sigma[-1]), float(sigma[0]), steps)
        index = timesteps.log_times(sigmas, products)
    else:
        index = timesteps.dpm_timesteps(c, r, timesteps.last_timestep(c, products))
        sigmas = np.interp(index, np.arange(total), sigma)
    whole = ("use_karras_sigmas",) if rounded == "karras" else (spreads[0], spreads[3])
    cosine = rounded == "but cosine" and c.beta_schedule == "squaredcos_cap_v2"
    index = index.round() if used and used[0] in whole and not cosine else index
    if repeat:
        last = sigmas[-1] if used or c.use_flow_sigmas else sigma[0]
    else:
        last = sigma[0] if c.final_sigmas_type == "sigma_min" else 0.0
    index, sigmas = index.astype(np.int64), np.append(sigmas, last)
    if c.use_flow_sigmas:
        return timesteps.flow_grid(index, sigmas, total), index, schedule
    return timesteps.table_grid(schedule, index, sigmas), index, schedule


def falling_orders(c: SimpleNamespace, steps: int, zero: bool = True) -> list[int]:
    """Each step's order: the last two are lower if there are fewer than 15 (lower_order_final);
    the last is of order 1 with euler_at_final, or if it goes to clean data."""
    orders = [c.solver_order] * steps
    few = c.lower_order_final and steps < 15
    if few and steps > 1:
        orders[-2] = min(2, c.solver_order)
    to_clean = zero and getattr(c, "final_sigmas_type", None) == "zero"
    if few or to_clean or getattr(c, "euler_at_final", False):
        orders[-1] = 1
    return orders


def refuse_still(c: SimpleNamespace, grid: NoiseLevel, orders: list[int]) -> None:
    """Refuses a repeated last sigma where diffusers' formulas are 0 / 0: all but order 1 and
    "midpoint"."""
    steep = orders[-1] > 2 or (orders[-1] == 2 and c.solver_type == "heun")
    here, last = grid.ratio[-2:]
    if steep and abs(last - here) < 1e-6 * here:
        raise ValueError(
            f"final_sigmas_type: the last sigma is repeated, where solver_type={c.solver_type!r} "
            f"of order {orders[-1]} divides by zero; use 'zero', euler_at_final=True or fewer "
            "than 15 steps"
        )


def check_flow_prediction(c: SimpleNamespace, data: bool) -> None:
    """Refuses v on the flow, and the flow's velocity elsewhere: diffusers' formulas are wrong."""
    flow = c.prediction_type == "flow_prediction"
    if flow and not c.use_flow_sigmas:
        raise ValueError("prediction_type: 'flow_prediction' needs use_flow_sigmas=True")
    if flow and not data:
        raise ValueError("prediction_type: 'flow_prediction' needs data prediction ('...++')")
    if c.use_flow_sigmas and c.prediction_type == "v_prediction":
        raise ValueError(
            "prediction_type: 'v_prediction' is not supported with use_flow_sigmas=True, where "
            "diffusers leaves out 1 / (alpha^2 + sigma^2); use 'flow_prediction'"
        )


def lambda_sampler(
    c: SimpleNamespace, schedule: scheduler.LogTable, grid: NoiseLevel, solver: Solver
) -> Sampler:
    total, t = c.num_train_timesteps, solver.level.t
    return Sampler(
        RectifiedFlow() if c.use_flow_sigmas else schedule,
        scheduler.PREDICTIONS[c.prediction_type],
        partial(scheduler.scaled_time if c.use_flow_sigmas else ddpm_index, steps=total),
        grid,
        solver._replace(init=np.float64(1.0)),
        (total * t - (not c.use_flow_sigmas)).round(),
        scheduler.transform_of(c),
    )
