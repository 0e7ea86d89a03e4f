"""UniPC, DEIS and SA-Solver."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from diffusion.levels import NoiseLevel
from diffusion.pretrained.schedulers import log_snr, scheduler, timesteps
from diffusion.pretrained.schedulers.flows import shifted, stretched
from diffusion.pretrained.schedulers.scheduler import Request, Sampler
from diffusion.sampling.solvers.adams import deis as deis_solver
from diffusion.sampling.solvers.predictor_corrector import stochastic_adams
from diffusion.sampling.solvers.predictor_corrector import unipc as unipc_solver
from diffusion.sampling.tables import far


def unipc(c: SimpleNamespace, r: Request) -> Sampler:
    """UniPC (``solvers.unipc``)."""
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
    log_snr.check_flow_prediction(c, c.predict_x0)
    if c.use_flow_sigmas and (c.use_exponential_sigmas or c.use_beta_sigmas):
        raise ValueError("use_flow_sigmas: not with use_exponential_sigmas or use_beta_sigmas")
    products = scheduler.alphas_cumprod(c, floor=True)
    schedule, sigma = scheduler.table_of(products), timesteps.ratios(products)
    total, steps = c.num_train_timesteps, r.count
    sigmas = timesteps.spread(c, float(sigma[-1]), float(sigma[0]), steps)
    if c.use_flow_sigmas:
        if sigmas is not None:
            sigmas = sigmas / (sigmas + 1)
        else:
            sigmas = np.linspace(1, 1 / total, steps + 1)[:-1] if r.sigmas is None else r.sigmas
            dynamic = (r.mu, c.time_shift_type)
            shift, kind = dynamic if c.use_dynamic_shifting else (c.flow_shift, None)
            sigmas = stretched(shifted(sigmas, shift, kind), c.shift_terminal)
            if abs(sigmas[0] - 1) < 1e-6:
                sigmas[0] -= 1e-6
        index, last = (sigmas * total).astype(np.int64), sigmas[-1]
    elif sigmas is not None:
        index, last = timesteps.log_times(sigmas, products), sigmas[-1]
        index = (index.round() if c.use_karras_sigmas else index).astype(np.int64)
    else:
        index, last = timesteps.dpm_timesteps(c, r, total), sigma[0]
        sigmas = np.interp(index, np.arange(total), sigma)
    sigmas = np.append(sigmas, last if c.final_sigmas_type == "sigma_min" else 0.0)
    if c.use_flow_sigmas:
        grid = timesteps.flow_grid(index, sigmas, total)
    else:
        grid = timesteps.table_grid(schedule, index, sigmas)
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
    _check_near(grid, start, "predict_x0: False", not c.predict_x0)
    solver = unipc_solver(
        scheduler.part(grid, start),
        c.solver_order,
        c.solver_type,
        "x0" if c.predict_x0 else "eps",
        orders=orders[start:],
        corrected=corrected[start:],
    )
    return log_snr.lambda_sampler(c, schedule, scheduler.part(grid, start), solver)


def deis(c: SimpleNamespace, r: Request) -> Sampler:
    """DEIS in log(sigma/alpha) (``solvers.deis``); it ends at the table's or the spread's last
    sigma, not at clean data."""
    log_snr.check_flow_prediction(c, True)
    grid, index, schedule = log_snr.lambda_grid(c, r, rounded="karras", repeat=True)
    orders = log_snr.falling_orders(c, len(index), zero=False)
    start = r.start(len(index))
    solver = deis_solver(scheduler.part(grid, start), c.solver_order, orders[start:])
    return log_snr.lambda_sampler(c, schedule, scheduler.part(grid, start), solver)


def sa_solver(c: SimpleNamespace, r: Request) -> Sampler:
    """SA-Solver (``predictor_corrector.stochastic_adams``), tau = 1 for timesteps 200..800, else 0.

    Its last sigma is as in ``deis``.
    """
    data = c.algorithm_type == "data_prediction"
    if c.thresholding and not data:
        raise ValueError("thresholding: SASolverScheduler needs algorithm_type='data_prediction'")
    log_snr.check_flow_prediction(c, data)
    grid, index, schedule = log_snr.lambda_grid(c, r, rounded="karras", repeat=True)
    steps, start = len(index), r.start(len(index))
    predictor, corrector = [c.predictor_order] * steps, [c.corrector_order] * steps
    if c.lower_order_final:
        predictor = [min(c.predictor_order, steps - i) for i in range(steps)]
        corrector = [min(c.corrector_order, steps - i + 1) for i in range(steps)]
    room = max(c.predictor_order, c.corrector_order - 1)
    known = [min(i, room) for i in range(steps - start)]  # evaluations before this step's
    _check_near(grid, start, "algorithm_type: 'noise_prediction'", not data)
    solver = stochastic_adams(
        scheduler.part(grid, start),
        [float(200 <= k <= 800) for k in index[start:]],
        [min(k, i + 1) for k, i in zip(predictor[start:], known)],
        [min(k, i + 2) for k, i in zip(corrector[start:], known)],
        prediction="x0" if data else "eps",
        longest=math.inf,  # as in diffusers
    )
    return log_snr.lambda_sampler(c, schedule, scheduler.part(grid, start), solver)


def _check_near(grid: NoiseLevel, start: int, field: str, noise: bool) -> None:
    """Our correctors skip steps from beyond sigma = 1000 in noise prediction, where diffusers'
    corrections are only rounding errors of float32."""
    if noise and far(NoiseLevel(*(leaf[start] for leaf in grid))):
        raise ValueError(
            f"{field} is not supported from sigma = {grid.ratio[start]:.6g} > 1000; use data "
            "prediction, or a schedule that starts lower"
        )
