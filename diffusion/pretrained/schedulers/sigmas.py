"""The classes that step in sigma space: Euler, Heun, LMS, KDPM2, and EDM's and consistency models'.

diffusers' latents there are x_0 + sigma eps and are scaled by 1/sqrt(sigma^2 + 1) for the network;
x here is what the network sees, alpha times theirs with alpha = 1/sqrt(sigma^2 + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from diffusion import predictions
from diffusion.denoiser import ddpm_index, log_sigma
from diffusion.levels import Array, NoiseLevel
from diffusion.pretrained.schedulers import scheduler, timesteps
from diffusion.pretrained.schedulers.log_snr import falling_orders, refuse_still
from diffusion.pretrained.schedulers.scheduler import Request, Sampler
from diffusion.sampling.solvers.adams import lms as adams_lms
from diffusion.sampling.solvers.dpm_solver import multistep
from diffusion.sampling.solvers.one_step import euler as euler_solver
from diffusion.sampling.solvers.one_step import euler_ancestral as ancestral_solver
from diffusion.sampling.solvers.runge_kutta import dpm2, dpm2_ancestral, heun_rows
from diffusion.sampling.tables import D, Row, Solver, Z, nodes, table
from diffusion.schedules import EDM

Build = Callable[[NoiseLevel, scheduler.LogTable], Solver]


def euler(c: SimpleNamespace, r: Request) -> Sampler:
    """Euler's method (``solvers.euler``), on sigmas interpolated between the table's.

    With timestep_type "continuous" and v_prediction the network receives log(sigma)/4 (Stable Video
    Diffusion). With interpolation_type "log_linear" there are N + 1 sigmas, of which the last,
    the table's first, is where it ends (and N + 1 steps where both are so). Zero terminal SNR is
    diffusers' sigma = 4096.
    """
    sampler = _discrete(c, r, lambda grid, _: euler_solver(grid))
    if _continuous(c):
        if r.timesteps is not None:
            raise ValueError("timesteps: not with timestep_type='continuous' and v_prediction")
        level = sampler.solver.level
        return sampler._replace(c_noise=log_sigma, timesteps=np.log(level.ratio) / 4)
    return sampler


def euler_ancestral(c: SimpleNamespace, r: Request) -> Sampler:
    """Euler ancestral (``solvers.euler_ancestral``)."""
    return _discrete(c, r, lambda grid, _: ancestral_solver(grid))


def heun(c: SimpleNamespace, r: Request) -> Sampler:
    """Heun's method in sigma space throughout (``solvers.heun`` leaves it beyond sigma = 1000)."""

    def build(grid: NoiseLevel, _: scheduler.LogTable) -> Solver:
        steps = pairwise(nodes(grid))
        return table([row for now, after in steps for row in heun_rows(now, after, 0.0)])

    return _discrete(c, r, build)


def kdpm2(c: SimpleNamespace, r: Request) -> Sampler:
    """k-diffusion's DPM2 (``solvers.dpm2``)."""
    return _discrete(c, r, dpm2, rounded=True)


def kdpm2_ancestral(c: SimpleNamespace, r: Request) -> Sampler:
    """k-diffusion's DPM2 ancestral (``solvers.dpm2_ancestral``)."""
    return _discrete(c, r, dpm2_ancestral, rounded=True)


def lms(c: SimpleNamespace, r: Request) -> Sampler:
    """Linear multistep of order 4 (``solvers.lms``)."""
    for name in ("strength", "begin"):
        if getattr(r, name) is not None:
            raise ValueError(
                f"{name}: LMSDiscreteScheduler in diffusers weighs derivatives that were not taken "
                "before its first step; use another class"
            )
    return _discrete(c, r, lambda grid, _: adams_lms(grid))


def _discrete(c: SimpleNamespace, r: Request, build: Build, rounded: bool = False) -> Sampler:
    """Timesteps -> sigmas -> grid -> the solver ``build(grid)``.

    ``rounded``: Karras' sigmas go with whole timesteps, as in KDPM2.
    """
    products = scheduler.alphas_cumprod(c, floor=True)
    schedule = scheduler.table_of(products)
    index, sigmas = _sigmas(c, r, products, rounded)
    grid = timesteps.table_grid(schedule, index, sigmas)
    start = r.start(r.count)
    solver = build(scheduler.part(grid, start), schedule)
    if start == 0 and c.timestep_spacing in ("linspace", "trailing"):
        solver = solver._replace(init=grid.sigma[0])  # sigma_max, in our scale
    level = solver.level
    return Sampler(
        schedule,
        scheduler.PREDICTIONS[c.prediction_type],
        partial(ddpm_index, steps=schedule.steps),
        scheduler.part(grid, start),
        solver,
        schedule.steps * level.t - 1,
        scheduler.transform_of(c),
        (float(level.alpha[0]), float(grid.alpha[-1])),
    )


def _continuous(c: SimpleNamespace) -> bool:
    """Whether the network receives log(sigma)/4."""
    continuous = getattr(c, "timestep_type", None) == "continuous"
    return continuous and c.prediction_type == "v_prediction"


def _sigmas(
    c: SimpleNamespace, r: Request, products: np.ndarray, rounded: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps [N], sigmas [N + 1])."""
    if r.sigmas is not None:
        given = np.asarray(r.sigmas, np.float32)
        return timesteps.log_times(given[:-1], products).astype(np.float32), given
    fields = vars(c)
    spreads = any(fields.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    if r.timesteps is not None and spreads:
        raise ValueError("timesteps: not with use_karras, use_exponential or use_beta_sigmas")
    index, count = timesteps.k_timesteps(c, r), r.count
    sigma = timesteps.ratios(products)
    sigmas = np.interp(index, np.arange(len(sigma)), sigma)
    logarithmic = fields.get("interpolation_type") == "log_linear"
    if logarithmic:
        sigmas = np.exp(np.linspace(np.log(sigma[-1]), np.log(sigma[0]), count + 1))
    if spreads:
        sigmas = timesteps.spread(c, float(sigmas[0]), float(sigmas[-1]), count)
        index = timesteps.log_times(sigmas, products)
        if c.use_karras_sigmas and rounded:
            index = index.round()
    elif logarithmic and not _continuous(c):
        return index, sigmas
    elif logarithmic:  # one more step, to the end that final_sigmas_type names
        index = timesteps.log_times(sigmas, products)
    last = sigma[0] if fields.get("final_sigmas_type") == "sigma_min" else 0.0
    return np.asarray(index, np.float32), np.append(sigmas, last)


def edm_euler(c: SimpleNamespace, r: Request) -> Sampler:
    """Euler's method on EDM's own sigmas, with EDM's preconditioning."""
    sigmas = _edm_sigmas(c, r.steps)
    last = sigmas[-1] if c.final_sigmas_type == "sigma_min" else 0.0
    grid = _edm_grid(np.append(sigmas, last))
    return _edm(c, grid, euler_solver(grid))


def edm_dpm(c: SimpleNamespace, r: Request) -> Sampler:
    """DPM-Solver++ on EDM's own sigmas (``dpm_solver.multistep`` with curvature 1)."""
    if c.algorithm_type == "sde-dpmsolver++" and c.solver_order == 3:
        raise ValueError("solver_order: 3 is not supported with 'sde-dpmsolver++'; use 2")
    sigmas = _edm_sigmas(c, r.steps)
    last = c.sigma_min if c.final_sigmas_type == "sigma_min" else 0.0
    grid = _edm_grid(np.append(sigmas, last))
    eta = float(c.algorithm_type == "sde-dpmsolver++")
    orders = falling_orders(c, r.steps)
    if eta and c.final_sigmas_type == "sigma_min":
        raise ValueError(
            "final_sigmas_type: 'sigma_min' repeats the last sigma, which can be NaN in diffusers "
            "with 'sde-dpmsolver++'; use 'zero'"
        )
    refuse_still(c, grid, orders)
    options = {"kind": c.solver_type, "eta": eta, "orders": orders, "curvature": 1}
    return _edm(c, grid, multistep(grid, c.solver_order, **options))


def _edm_sigmas(c: SimpleNamespace, steps: int) -> np.ndarray:
    ramp = np.linspace(0, 1, steps)
    if c.sigma_schedule == "karras":
        return timesteps.karras(ramp, c.sigma_min, c.sigma_max, c.rho)
    return np.exp(np.linspace(np.log(c.sigma_min), np.log(c.sigma_max), steps))[::-1]


def _edm_grid(sigmas: np.ndarray) -> NoiseLevel:
    sigmas = timesteps.still(np.asarray(sigmas, np.float32).astype(np.float64))
    return NoiseLevel(sigmas, np.ones_like(sigmas), sigmas)


def _edm(c: SimpleNamespace, grid: NoiseLevel, solver: Solver) -> Sampler:
    row = predictions.edm if c.prediction_type == "epsilon" else scheduler.negative_edm
    return Sampler(
        EDM(c.sigma_max),
        partial(row, sigma_data=c.sigma_data),
        log_sigma,
        grid,
        solver._replace(init=np.sqrt(c.sigma_max**2 + 1)),
        np.log(solver.level.ratio) / 4,
        scheduler.transform_of(c),
    )


def consistency(c: SimpleNamespace, r: Request) -> Sampler:
    """Multistep consistency sampling (``solvers.consistency``), on Karras' sigmas.

    The model's boundary condition f(x, sigma_min) = x is in ``transform``, before the clipping.
    """
    total = c.num_train_timesteps
    if r.timesteps is not None:
        index = timesteps.in_table(r.timesteps, total)[::-1]
        if np.any(np.diff(index) <= 0):
            raise ValueError(f"timesteps must descend, got {list(r.timesteps)}")
    elif r.steps > total:
        raise ValueError(f"steps: {r.steps} is more than num_train_timesteps={total}")
    else:
        index = np.arange(r.steps) * (total // r.steps)
    sigmas = timesteps.karras(index / (total - 1), c.sigma_min, c.sigma_max, c.rho)
    grid = np.append(sigmas, c.sigma_min).astype(np.float32).astype(np.float64)
    grid = NoiseLevel(grid, np.ones_like(grid), grid)
    rows = []
    for sigma, after in zip(sigmas, grid.sigma[1:]):
        after = np.clip(after, c.sigma_min, c.sigma_max)
        std = c.s_noise * np.sqrt(max(after**2 - c.sigma_min**2, 0))
        sigma = np.float64(np.float32(sigma))
        rows.append(Row(NoiseLevel(sigma, 1.0, sigma), [D + std * Z]))
    solver = table(rows)

    def boundary(x: Array, level: NoiseLevel, x0: Array) -> Array:
        """f = c_skip x + c_out F with f = x at sigma_min (Song et al., 2023, appendix C)."""
        above, square = level.sigma - c.sigma_min, c.sigma_data**2
        edm_skip = square / (level.sigma**2 + square)
        f = square / (above**2 + square) * x + above / level.sigma * (x0 - edm_skip * x)
        return jnp.clip(f, -1, 1) if c.clip_denoised else f

    return Sampler(
        EDM(c.sigma_max),
        partial(predictions.edm, sigma_data=c.sigma_data),
        scheduler.log_sigma_1000,
        grid,
        solver._replace(init=np.float64(c.sigma_max)),
        250 * np.log(solver.level.sigma),
        partial(scheduler.on_x0, change=boundary),
    )
