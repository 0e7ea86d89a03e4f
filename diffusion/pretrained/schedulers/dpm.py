"""DPM-Solver and DPM-Solver++: multistep, singlestep and inverse."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from diffusion.pretrained.schedulers.log_snr import (
    check_flow_prediction,
    falling_orders,
    lambda_grid,
    lambda_sampler,
    refuse_still,
)
from diffusion.pretrained.schedulers.scheduler import (
    Request,
    Sampler,
    alphas_cumprod,
    part,
    table_of,
)
from diffusion.pretrained.schedulers.timesteps import (
    last_timestep,
    log_times,
    ratios,
    spread,
    table_grid,
)
from diffusion.sampling.solvers.dpm_solver import multistep, singlestep


def multistep_class(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver and DPM-Solver++, multistep (``solvers.multistep``; order 3 with curvature 1).

    Zero terminal SNR is diffusers' sigma = 4096.

    Raises:
      ValueError: for final_sigmas_type "zero" with noise prediction, and "sde-dpmsolver++" of
        order 3, whose formula in diffusers has a wrong sign; and where it divides by zero.
    """
    _check_dpm(c)
    if c.solver_order == 3 and c.algorithm_type.startswith("sde"):
        raise ValueError(
            f"solver_order: 3 is not supported with {c.algorithm_type!r}; diffusers' formula has "
            "a wrong sign; use 2"
        )
    grid, index, schedule = lambda_grid(c, r, rounded="but cosine")
    start, orders = r.start(len(index)), falling_orders(c, len(index))
    refuse_still(c, grid, orders)
    solver = multistep(
        part(grid, start),
        c.solver_order,
        prediction="x0" if c.algorithm_type.endswith("++") else "eps",
        kind=c.solver_type,
        eta=float(c.algorithm_type.startswith("sde")),
        orders=orders[start:],
        curvature=1.0,
    )
    return lambda_sampler(c, schedule, part(grid, start), solver)


def singlestep_class(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver and DPM-Solver++, singlestep (``solvers.singlestep``).

    Raises:
      ValueError: as ``multistep_class``, order 3 only with solver_type "heun"; and thresholding
        with noise prediction, which diffusers takes at no timestep.
    """
    _check_dpm(c)
    if c.solver_order == 3 and c.algorithm_type.startswith("sde") and c.solver_type == "heun":
        raise ValueError(
            f"solver_order: 3 is not supported with {c.algorithm_type!r} and solver_type='heun'; "
            "diffusers' formula has a wrong sign; use 2, or 'midpoint'"
        )
    if c.thresholding and c.algorithm_type == "dpmsolver":
        raise ValueError("thresholding: DPMSolverSinglestepScheduler needs 'dpmsolver++'")
    grid, index, schedule = lambda_grid(c, r, rounded="karras")
    start, orders = r.start(len(index)), _block_orders(c, len(index))[r.start(len(index)) :]
    orders = [min(k, i + 1) for i, k in enumerate(orders)]
    solver = singlestep(
        part(grid, start),
        c.solver_order,
        prediction="x0" if c.algorithm_type.endswith("++") else "eps",
        kind=c.solver_type,
        eta=float(c.algorithm_type.startswith("sde")),
        orders=orders,
    )
    return lambda_sampler(c, schedule, part(grid, start), solver)


def inverse(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver(++) from less to more noise, for inversion.

    As in diffusers, timesteps that round to the same number are evaluated once, and then the
    sigmas of the first ones are used: with use_karras_sigmas and many steps the two do not match,
    and it ends below sigma_max. Give the data, noised to ``solver.level[0]`` or not, as x_init.

    Raises:
      ValueError: for use_flow_sigmas, which diffusers runs from noise to data here too; and what
        makes its last step, of length zero, 0 / 0.
    """
    if c.use_flow_sigmas:
        raise ValueError("use_flow_sigmas: not supported by DPMSolverMultistepInverseScheduler")
    products = alphas_cumprod(c)
    schedule, total, steps = table_of(products), c.num_train_timesteps, r.steps
    last = last_timestep(c, products)
    if c.timestep_spacing == "linspace":
        index = np.linspace(0, last - 1, steps + 1).round()[:-1]
    elif c.timestep_spacing == "leading":
        index = np.arange(steps) * (last // (steps + 1)) + c.steps_offset
    else:
        index = (np.arange(last, 0, -total / steps).round() - 1)[::-1]
    sigma = ratios(products)
    sigmas = spread(c, float(sigma[0]), float(sigma[-1]), steps)
    if sigmas is None:
        sigmas = np.append(np.interp(index, np.arange(total), sigma), sigma[last - 1])
    else:
        index = log_times(sigmas, products)
        index = index.round() if c.use_karras_sigmas else index
        sigmas = np.append(sigmas, sigmas[-1])
    index = np.unique(index).astype(np.int64)  # ascending
    orders = falling_orders(c, len(index), zero=False)
    sigmas = sigmas[: len(index) + 1].astype(np.float32)
    grid = table_grid(schedule, index, sigmas)
    refuse_still(c, grid, orders)
    solver = multistep(
        grid,
        c.solver_order,
        prediction="x0" if c.algorithm_type.endswith("++") else "eps",
        kind=c.solver_type,
        orders=orders,
        curvature=1.0,
        rising=True,
    )
    return lambda_sampler(c, schedule, grid, solver)


def _block_orders(c: SimpleNamespace, steps: int) -> list[int]:
    """The singlestep class's blocks; lower_order_final is on where it must be."""
    order, zero = c.solver_order, c.final_sigmas_type == "zero"
    orders = [1 + i % order for i in range(steps)]
    if zero or (c.lower_order_final and steps % order == 0):
        orders[-1] = 1  # the last block would end with a high order
    return orders


def _check_dpm(c: SimpleNamespace) -> None:
    data = c.algorithm_type.endswith("++")
    if not data and c.final_sigmas_type == "zero":
        raise ValueError(
            f"final_sigmas_type: 'zero' is not supported with algorithm_type="
            f"{c.algorithm_type!r}; use 'sigma_min'"
        )
    check_flow_prediction(c, data)
