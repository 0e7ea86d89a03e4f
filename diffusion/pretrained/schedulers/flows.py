"""The flow-matching classes (SD3, FLUX): alpha = 1 - sigma, and the network receives T sigma."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np

from diffusion import predictions
from diffusion.levels import NoiseLevel
from diffusion.pretrained.schedulers import scheduler, timesteps
from diffusion.pretrained.schedulers.scheduler import Request, Sampler
from diffusion.sampling.solvers.one_step import euler as euler_solver
from diffusion.sampling.solvers.runge_kutta import flow_heun
from diffusion.sampling.tables import D, Row, Solver, Z, nodes, table
from diffusion.schedules import RectifiedFlow


def euler(c: SimpleNamespace, r: Request) -> Sampler:
    """Euler's method on the flow (``solvers.euler``); with stochastic_sampling, each step goes to
    x_0 and noises it anew.

    As in diffusers: without custom sigmas the shift applies twice, to the range of times and to
    each; custom sigmas [N], without the final 0, are shifted once. With custom timesteps alone, the
    network receives them unshifted, while the sigmas made from them are shifted; if both are given,
    they are independent. invert_sigmas (Mochi) counts time from noise to data and predicts x_0 -
    eps; with stochastic_sampling diffusers would noise its estimate of the noise.
    """
    if c.use_dynamic_shifting and r.mu is None:
        raise ValueError("use_dynamic_shifting: True needs mu (``dynamic_mu``)")
    if c.stochastic_sampling and c.invert_sigmas:
        raise ValueError("stochastic_sampling: True is not supported with invert_sigmas=True")
    total, steps = c.num_train_timesteps, r.count
    if r.sigmas is not None:
        sigmas = np.asarray(r.sigmas, np.float32)
    elif r.timesteps is not None:
        sigmas = np.asarray(r.timesteps, np.float32) / np.float32(total)
    else:
        once = None if c.use_dynamic_shifting else c.shift
        sigmas = np.linspace(shifted(1.0, once, None), shifted(1 / total, once, None), steps)
    if len(sigmas) != steps:
        raise ValueError(f"sigmas and timesteps must have {steps} entries, got {len(sigmas)}")
    shift, kind = (r.mu, c.time_shift_type) if c.use_dynamic_shifting else (c.shift, None)
    sigmas = stretched(shifted(sigmas, shift, kind), c.shift_terminal)
    wider = timesteps.spread(c, float(sigmas[0]), float(sigmas[-1]), steps)
    sigmas = np.asarray(sigmas if wider is None else wider, np.float32)
    # With invert_sigmas the network receives T (1 - sigma), whatever timesteps were given.
    follow = r.timesteps is None or c.invert_sigmas
    index = sigmas * np.float32(total) if follow else np.asarray(r.timesteps)
    grid = timesteps.flow_grid(index, np.append(sigmas, 0.0), total)
    grid = scheduler.part(grid, _start(r, steps))
    if not c.stochastic_sampling:
        return _sampler(c, grid, euler_solver(grid), c.invert_sigmas)
    pairs = pairwise(nodes(grid))
    rows = [Row(now, [after.alpha * D + after.sigma * Z]) for now, after in pairs]
    return _sampler(c, grid, table(rows), inverted=False)


def heun(c: SimpleNamespace, r: Request) -> Sampler:
    """Heun's method on the flow (``solvers.flow_heun``); shifted twice, as ``euler``."""
    ends = shifted(1.0, c.shift, None), shifted(1 / c.num_train_timesteps, c.shift, None)
    sigmas = shifted(np.linspace(*ends, r.steps), c.shift, None).astype(np.float32)
    index = sigmas * np.float32(c.num_train_timesteps)
    grid = timesteps.flow_grid(index, np.append(sigmas, 0.0), c.num_train_timesteps)
    grid = scheduler.part(grid, _start(r, r.steps))
    return _sampler(c, grid, flow_heun(grid), False)


def shifted(t: np.ndarray | float, shift: float | None, dynamic: str | None) -> np.ndarray:
    """shift t / (1 + (shift - 1) t); ``dynamic``: shift is e^mu ("exponential") or mu ("linear").

    Esser et al., 2024, eq. 23; None for no shift.
    """
    if shift is None:
        return np.asarray(t)
    shift = float(np.exp(shift)) if dynamic == "exponential" else shift
    return shift * np.asarray(t) / (1 + (shift - 1) * np.asarray(t))


def stretched(t: np.ndarray, terminal: float | None) -> np.ndarray:
    """Times stretched about 1 so that the last is ``terminal`` (LTX-Video)."""
    return 1 - (1 - t) * ((1 - terminal) / (1 - t[-1])) if terminal else t


def _start(r: Request, steps: int) -> int:
    """The first step as in pipelines of flow models, which round the steps that are left out."""
    if r.strength is None:
        return r.begin or 0
    return int(max(steps - min(steps * r.strength, steps), 0))


def _sampler(c: SimpleNamespace, grid: NoiseLevel, solver: Solver, inverted: bool) -> Sampler:
    total, t = c.num_train_timesteps, solver.level.t
    return Sampler(
        RectifiedFlow(),
        scheduler.reversed_flow if inverted else predictions.flow,
        partial(scheduler.reversed_time if inverted else scheduler.scaled_time, steps=total),
        grid,
        solver._replace(init=np.float64(1.0)),
        total * (1 - t if inverted else t),
        scheduler.unchanged,
    )
