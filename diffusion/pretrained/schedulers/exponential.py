"""The multistep and singlestep classes in lambda: DPM-Solver(++), UniPC, DEIS and SA-Solver.

Their x is variance preserving, as ours. With use_flow_sigmas they run on the rectified flow,
alpha = 1 - sigma, and the network is told floor(T sigma).
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np

from diffusion.denoiser import ddpm_index
from diffusion.levels import NoiseLevel
from diffusion.pretrained.schedulers.common import (
    PREDICTIONS,
    LogTable,
    Request,
    Sampler,
    alphas_cumprod,
    part,
    scaled_time,
    table_of,
    transform_of,
)
from diffusion.pretrained.schedulers.flows import shifted, stretched
from diffusion.pretrained.schedulers.spacing import (
    dpm_timesteps,
    flow_grid,
    last_timestep,
    log_times,
    ratios,
    spread,
    table_grid,
)
from diffusion.sampling.solvers.adams import deis as deis_solver
from diffusion.sampling.solvers.dpm_solver import multistep, singlestep
from diffusion.sampling.solvers.predictor_corrector import stochastic_adams
from diffusion.sampling.solvers.predictor_corrector import unipc as unipc_solver
from diffusion.sampling.tables import Solver
from diffusion.schedules import RectifiedFlow


def dpm_multistep(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver and DPM-Solver++, multistep (``solvers.multistep``; order 3 with curvature 1).

    Zero terminal SNR is diffusers' sigma = 4096.

    Raises:
      ValueError: for final_sigmas_type "zero" with noise prediction, and "sde-dpmsolver++" of
        order 3, whose formula in diffusers has a wrong sign.
    """
    _check_dpm(c)
    if c.solver_order == 3 and c.algorithm_type.startswith("sde"):
        raise ValueError(
            f"solver_order: 3 is not supported with {c.algorithm_type!r}; diffusers' formula has "
            "a wrong sign; use 2"
        )
    grid, index, schedule = _grid(c, r, rounded="but cosine")
    start, orders = r.start(len(index)), falling_orders(c, len(index))
    solver = multistep(
        part(grid, start),
        c.solver_order,
        prediction="x0" if c.algorithm_type.endswith("++") else "eps",
        kind=c.solver_type,
        eta=float(c.algorithm_type.startswith("sde")),
        orders=orders[start:],
        curvature=1.0,
    )
    return _sampler(c, schedule, part(grid, start), solver)


def dpm_singlestep(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver and DPM-Solver++, singlestep (``solvers.singlestep``).

    Raises:
      ValueError: as ``dpm_multistep``, order 3 only with solver_type "heun"; and thresholding
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
    grid, index, schedule = _grid(c, r, rounded="karras")
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
    return _sampler(c, schedule, part(grid, start), solver)


def dpm_inverse(c: SimpleNamespace, r: Request) -> Sampler:
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
    if sigmas[-1] == sigmas[-2] and orders[-1] > 1:
        if c.solver_type == "heun" or c.solver_order == 3:
            raise ValueError(
                f"solver_type: {c.solver_type!r} of order {c.solver_order} divides by zero in the "
                "last step; use euler_at_final=True"
            )
        orders[-1] = 1
    grid = table_grid(schedule, index, sigmas)
    solver = multistep(
        grid,
        c.solver_order,
        prediction="x0" if c.algorithm_type.endswith("++") else "eps",
        kind=c.solver_type,
        orders=orders,
        curvature=1.0,
        rising=True,
    )
    return _sampler(c, schedule, grid, solver)


def unipc(c: SimpleNamespace, r: Request) -> Sampler:
    """UniPC (``solvers.unipc``).

    Raises:
      ValueError: for what is NaN or ignored in diffusers: final_sigmas_type "zero" with "bh1" or
        with predict_x0=False, or without lower_order_final; thresholding with predict_x0=False.
    """
    if c.final_sigmas_type == "zero":
        uneven = not c.lower_order_final and c.solver_order > 1
        bad = {"solver_type": c.solver_type == "bh1", "predict_x0": not c.predict_x0}
        for field, is_bad in {**bad, "lower_order_final": uneven}.items():
            if is_bad:
                raise ValueError(
                    f"{field}: {getattr(c, field)!r} is NaN in diffusers with final_sigmas_type="
                    "'zero'; use 'sigma_min', or the field's default"
                )
    if c.thresholding and not c.predict_x0:
        raise ValueError("thresholding: diffusers ignores it with predict_x0=False")
    if c.shift_terminal is not None and not c.use_flow_sigmas:
        raise ValueError("shift_terminal: only with use_flow_sigmas=True")
    if c.use_dynamic_shifting and r.mu is None:
        raise ValueError("use_dynamic_shifting: True needs mu (``dynamic_mu``)")
    if r.sigmas is not None and (not c.use_flow_sigmas or c.use_karras_sigmas):
        raise ValueError("sigmas: UniPC takes them with use_flow_sigmas=True and no other spread")
    _check_flow_prediction(c, c.predict_x0)
    if c.use_flow_sigmas and (c.use_exponential_sigmas or c.use_beta_sigmas):
        raise ValueError("use_flow_sigmas: not with use_exponential_sigmas or use_beta_sigmas")
    products = alphas_cumprod(c, floor=True)
    total, steps, sigma = c.num_train_timesteps, r.count, ratios(products)
    schedule = table_of(products)
    sigmas = spread(c, float(sigma[-1]), float(sigma[0]), steps)
    if c.use_flow_sigmas:
        if sigmas is not None:
            sigmas = sigmas / (sigmas + 1)
        else:
            sigmas = np.linspace(1, 1 / total, steps + 1)[:-1] if r.sigmas is None else r.sigmas
            shift = c.flow_shift if not c.use_dynamic_shifting else r.mu
            sigmas = shifted(sigmas, shift, c.time_shift_type if c.use_dynamic_shifting else None)
            sigmas = stretched(sigmas, c.shift_terminal)
            if abs(sigmas[0] - 1) < 1e-6:
                sigmas[0] -= 1e-6
        index, last = (sigmas * total).astype(np.int64), sigmas[-1]
    elif sigmas is not None:
        index, last = log_times(sigmas, products), sigmas[-1]
        index = (index.round() if c.use_karras_sigmas else index).astype(np.int64)
    else:
        index, last = dpm_timesteps(c, r, total), sigma[0]
        sigmas = np.interp(index, np.arange(total), sigma)
    sigmas = np.append(sigmas, last if c.final_sigmas_type == "sigma_min" else 0.0)
    grid = flow_grid(index, sigmas, total) if c.use_flow_sigmas else None
    grid = table_grid(schedule, index, sigmas) if grid is None else grid
    orders = [c.solver_order] * steps
    if c.lower_order_final:
        orders = [min(c.solver_order, steps - i) for i in range(steps)]
    elif sigmas[-1] == sigmas[-2]:
        if c.solver_order > 2:
            raise ValueError(
                f"lower_order_final: False with solver_order={c.solver_order} divides by zero in "
                "diffusers' last step; use True"
            )
        orders[-1] = 1
    corrected = [i not in c.disable_corrector for i in range(steps)]
    start = r.start(steps)
    solver = unipc_solver(
        part(grid, start),
        c.solver_order,
        c.solver_type,
        "x0" if c.predict_x0 else "eps",
        orders=orders[start:],
        corrected=corrected[start:],
    )
    return _sampler(c, schedule, part(grid, start), solver)


def deis(c: SimpleNamespace, r: Request) -> Sampler:
    """DEIS in log(sigma/alpha) (``solvers.deis``); it ends at the table's or the spread's last
    sigma, not at clean data."""
    _check_flow_prediction(c, True)
    grid, index, schedule = _grid(c, r, rounded="karras", repeat=True)
    orders = falling_orders(c, len(index), zero=False)
    start = r.start(len(index))
    solver = deis_solver(part(grid, start), c.solver_order, orders[start:])
    return _sampler(c, schedule, part(grid, start), solver)


def sa_solver(c: SimpleNamespace, r: Request) -> Sampler:
    """SA-Solver (``solvers.stochastic_adams``) with tau = 1 for timesteps 200..800, else 0.

    Its last sigma is as in ``deis``.

    Raises:
      ValueError: for thresholding with "noise_prediction", which diffusers takes at no timestep.
    """
    data = c.algorithm_type == "data_prediction"
    if c.thresholding and not data:
        raise ValueError("thresholding: SASolverScheduler needs algorithm_type='data_prediction'")
    _check_flow_prediction(c, data)
    grid, index, schedule = _grid(c, r, rounded="karras", repeat=True)
    steps, start = len(index), r.start(len(index))
    predictor, corrector = [c.predictor_order] * steps, [c.corrector_order] * steps
    if c.lower_order_final:
        predictor = [min(c.predictor_order, steps - i) for i in range(steps)]
        corrector = [min(c.corrector_order, steps - i + 1) for i in range(steps)]
    room = max(c.predictor_order, c.corrector_order - 1)
    known = [min(i, room) for i in range(steps - start)]  # evaluations before this step's
    solver = stochastic_adams(
        part(grid, start),
        [float(200 <= k <= 800) for k in index[start:]],
        [min(k, i + 1) for k, i in zip(predictor[start:], known)],
        [min(k, i + 2) for k, i in zip(corrector[start:], known)],
        prediction="x0" if data else "eps",
    )
    return _sampler(c, schedule, part(grid, start), solver)


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


def _block_orders(c: SimpleNamespace, steps: int) -> list[int]:
    """The singlestep class's blocks; lower_order_final is on where it must be."""
    order, zero = c.solver_order, c.final_sigmas_type == "zero"
    orders = [1 + i % order for i in range(steps)]
    if zero or (c.lower_order_final and steps % order == 0):
        orders[-1] = 1  # the last block would end with a high order
    return orders


def _grid(
    c: SimpleNamespace, r: Request, rounded: str, repeat: bool = False
) -> tuple[NoiseLevel, np.ndarray, LogTable | RectifiedFlow]:
    """(grid, timesteps [N], schedule) of DPM, DEIS and SA.

    Args:
      c, r: the config and the arguments.
      rounded: which spreads have rounded timesteps (others are cut off): "karras", or
        "but cosine": karras and lu, except with squaredcos_cap_v2.
      repeat: where the sigmas are spread, the last is repeated instead of final_sigmas_type.
    """
    spreads = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    used = [field for field in spreads if getattr(c, field, False)]
    if r.timesteps is not None and (used or c.use_flow_sigmas):
        raise ValueError(f"timesteps: not with {(used or ['use_flow_sigmas'])[0]}=True")
    if used and c.use_flow_sigmas:
        raise ValueError(f"use_flow_sigmas: diffusers ignores it with {used[0]}=True")
    if r.mu is not None and not (c.use_dynamic_shifting and c.time_shift_type == "exponential"):
        raise ValueError("mu: needs use_dynamic_shifting=True and time_shift_type='exponential'")
    products = alphas_cumprod(c, floor=True)
    schedule, total, steps = table_of(products), c.num_train_timesteps, r.count
    sigma = ratios(products)
    if c.use_flow_sigmas:
        shift = c.flow_shift if r.mu is None else float(np.exp(r.mu))
        sigmas = shifted((1 - np.linspace(1, 1 / total, steps + 1))[:0:-1], shift, None)
        index = sigmas * total
    elif getattr(c, "use_lu_lambdas", False):
        logs = np.log(sigma)
        sigmas = np.exp(np.linspace(float(logs[-1]), float(logs[0]), steps))
        index = log_times(sigmas, products)
    elif used:
        sigmas = spread(c, float(sigma[-1]), float(sigma[0]), steps)
        index = log_times(sigmas, products)
    else:
        index = dpm_timesteps(c, r, last_timestep(c, products))
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
        return flow_grid(index, sigmas, total), index, schedule
    return table_grid(schedule, index, sigmas), index, schedule


def _check_dpm(c: SimpleNamespace) -> None:
    data = c.algorithm_type.endswith("++")
    if not data and c.final_sigmas_type == "zero":
        raise ValueError(
            f"final_sigmas_type: 'zero' is not supported with algorithm_type="
            f"{c.algorithm_type!r}; use 'sigma_min'"
        )
    _check_flow_prediction(c, data)


def _check_flow_prediction(c: SimpleNamespace, data: bool) -> None:
    """v on the flow, and flow's velocity elsewhere, are formulas without meaning in diffusers."""
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


def _sampler(c: SimpleNamespace, schedule: LogTable, grid: NoiseLevel, solver: Solver) -> Sampler:
    total, t = c.num_train_timesteps, solver.level.t
    return Sampler(
        RectifiedFlow() if c.use_flow_sigmas else schedule,
        PREDICTIONS[c.prediction_type],
        partial(scaled_time if c.use_flow_sigmas else ddpm_index, steps=total),
        grid,
        solver._replace(init=np.float64(1.0)),
        (total * t - (not c.use_flow_sigmas)).round(),
        transform_of(c),
    )
