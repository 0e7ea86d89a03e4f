"""DPM-Solver and DPM-Solver++: multistep, singlestep and inverse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from diffusion.pretrained.schedulers import log_snr, scheduler, timesteps
from diffusion.pretrained.schedulers.scheduler import Request, Sampler
from diffusion.sampling.solvers.dpm_solver import multistep, singlestep


def multistep_class(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver and DPM-Solver++, multistep (``dpm_solver.multistep``; order 3 with curvature 1).

    Zero terminal SNR is diffusers' sigma = 4096.
    """
    _check_dpm(c, singlestep=False)
    grid, index, schedule = log_snr.lambda_grid(c, r, rounded="but cosine")
    start, orders = r.start(len(index)), log_snr.falling_orders(c, len(index))
    log_snr.refuse_still(c, grid, orders)
    grid = scheduler.part(grid, start)
    solver = multistep(grid, **_method(c), orders=orders[start:], curvature=1.0)
    return log_snr.lambda_sampler(c, schedule, grid, solver)


def singlestep_class(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver and DPM-Solver++, singlestep (``dpm_solver.singlestep``)."""
    _check_dpm(c, singlestep=True)
    if c.thresholding and c.algorithm_type == "dpmsolver":
        raise ValueError("thresholding: DPMSolverSinglestepScheduler needs 'dpmsolver++'")
    grid, index, schedule = log_snr.lambda_grid(c, r, rounded="karras")
    start, order, steps = r.start(len(index)), c.solver_order, len(index)
    orders = [1 + i % order for i in range(steps)]
    if c.final_sigmas_type == "zero" or (c.lower_order_final and steps % order == 0):
        orders[-1] = 1  # the last block would end with a high order
    orders = [min(k, i + 1) for i, k in enumerate(orders[start:])]
    grid = scheduler.part(grid, start)
    solver = singlestep(grid, **_method(c), orders=orders)
    return log_snr.lambda_sampler(c, schedule, grid, solver)


def inverse(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver(++) from less to more noise, for inversion.

    As in diffusers, timesteps that round to the same number are evaluated once, and then the
    sigmas of the first ones are used: with use_karras_sigmas and many steps the two do not match,
    and it ends below sigma_max. Give the data, noised to ``solver.level[0]`` or not, as x_init.
    """
    if c.use_flow_sigmas:  # diffusers runs from noise to data here too
        raise ValueError("use_flow_sigmas: not supported by DPMSolverMultistepInverseScheduler")
    products = scheduler.alphas_cumprod(c)
    schedule, total, steps = scheduler.table_of(products), c.num_train_timesteps, r.steps
    last = timesteps.last_timestep(c, products)
    if c.timestep_spacing == "linspace":
        index = np.linspace(0, last - 1, steps + 1).round()[:-1]
    elif c.timestep_spacing == "leading":
        index = np.arange(steps) * (last // (steps + 1)) + c.steps_offset
    else:
        index = (np.arange(last, 0, -total / steps).round() - 1)[::-1]
    sigma = timesteps.ratios(products)
    sigmas = timesteps.spread(c, float(sigma[0]), float(sigma[-1]), steps)
    if sigmas is None:
        sigmas = np.append(np.interp(index, np.arange(total), sigma), sigma[last - 1])
    else:
        index = timesteps.log_times(sigmas, products)
        index = index.round() if c.use_karras_sigmas else index
        sigmas = np.append(sigmas, sigmas[-1])
    index = np.unique(index).astype(np.int64)  # ascending
    orders = log_snr.falling_orders(c, len(index), zero=False)
    sigmas = sigmas[: len(index) + 1].astype(np.float32)
    grid = timesteps.table_grid(schedule, index, sigmas)
    log_snr.refuse_still(c, grid, orders)
    solver = multistep(grid, **_method(c), orders=orders, curvature=1.0, rising=True)
    return log_snr.lambda_sampler(c, schedule, grid, solver)


def _method(c: SimpleNamespace) -> dict[str, Any]:
    """The arguments of our solvers."""
    return {
        "order": c.solver_order,
        "prediction": "x0" if c.algorithm_type.endswith("++") else "eps",
        "kind": c.solver_type,
        "eta": float(c.algorithm_type.startswith("sde")),
    }


def _check_dpm(c: SimpleNamespace, singlestep: bool) -> None:
    data, sde = c.algorithm_type.endswith("++"), c.algorithm_type.startswith("sde")
    if sde and c.solver_order == 3 and not (singlestep and c.solver_type == "midpoint"):
        raise ValueError(
            f"solver_order: 3 is not supported with {c.algorithm_type!r} and solver_type="
            f"{c.solver_type!r}, where diffusers' formula has a wrong sign; use 2"
            + ", or 'midpoint'"
            * singlestep
        )
    if not data and c.final_sigmas_type == "zero":
        raise ValueError(
            f"final_sigmas_type: 'zero' is not supported with algorithm_type="
            f"{c.algorithm_type!r}; use 'sigma_min'"
        )
    log_snr.check_flow_prediction(c, data)
