"""The classes that step between table indices: DDPM, DDIM, PNDM, LCM, TCD and DDIM's inverse."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from diffusion.denoiser import ddpm_index
from diffusion.levels import Array, NoiseLevel, posterior
from diffusion.pretrained.schedulers import scheduler, timesteps
from diffusion.pretrained.schedulers.scheduler import Request, Sampler
from diffusion.sampling.solvers.adams import BASHFORTH
from diffusion.sampling.solvers.one_step import ddim_row, tcd_row
from diffusion.sampling.tables import RAW, Combination, D, Row, Solver, X, Y, Z, table

CLEAN = NoiseLevel(0.0, 1.0, 0.0)


def ddpm(c: SimpleNamespace, r: Request) -> Sampler:
    """The posterior's mean and a variance, between consecutive timesteps (``solvers.ddpm``).

    As in diffusers, noise is added in every step that does not start at table step 0: with
    steps_offset=1 the last step, to clean data, adds it too ("fixed_large", "learned_range").
    """
    schedule, total = scheduler.table_of(scheduler.alphas_cumprod(c)), c.num_train_timesteps
    custom = r.timesteps is not None
    index = timesteps.custom_timesteps(r, total) if custom else timesteps.ddim_timesteps(c, r.steps)
    index = index[r.start(len(index)) :]
    levels = [*_levels(schedule, index), CLEAN]
    rows, upper = [], []
    for k, now, after in zip(index, levels, levels[1:]):
        beta, variance, from_x, from_x0 = posterior(now, after)
        small, large = np.sqrt(max(variance, 1e-20)) * (k > 0), np.sqrt(beta) * (k > 0)
        std = large if c.variance_type == "fixed_large" else small
        rows.append(Row(now, [from_x * X + from_x0 * D + std * Z]))
        upper.append(large if c.variance_type == "learned_range" else std)
    solver = table(rows)
    solver.noise_upper[:, 0] = upper
    return _sampler(c, schedule, index, levels, solver)


def ddim(c: SimpleNamespace, r: Request) -> Sampler:
    """``solvers.ddim`` from t to t - T // N, whatever the spacing: where N does not divide T,
    "trailing" and "linspace" steps do not chain, and x is taken to be at the next timestep.

    A previous timestep below 0 is clean data, or with set_alpha_to_one=False table step 0. eta
    (default 0) and use_clipped_model_output are those of diffusers' ``step``; without the latter
    eps is the network's even where x_0 is clipped.
    """
    schedule = scheduler.table_of(scheduler.alphas_cumprod(c))
    index, eta = timesteps.ddim_timesteps(c, r.steps), r.eta or 0.0
    stride = c.num_train_timesteps // r.steps
    index = index[r.start(len(index)) :]
    levels = _levels(schedule, index)
    rows = []
    for k, now in zip(index, levels):
        after = _previous(schedule, k - stride, c.set_alpha_to_one)
        rows.append(ddim_row(now, after, eta, D if r.use_clipped_model_output else RAW))
    return _sampler(c, schedule, index, [*levels, after], table(rows))


def ddim_inverse(c: SimpleNamespace, r: Request) -> Sampler:
    """DDIM from less to more noise, for inversion: from t - T // N to t, ascending.

    As in diffusers, the network receives the timestep at which the step *ends*, while x is at the
    one before, first at clean data (set_alpha_to_one) or table step 0. ``solver.level`` is the
    former, ``grid`` the latter; give the data as x_init.
    """
    schedule = scheduler.table_of(scheduler.alphas_cumprod(c))
    index = timesteps.ddim_timesteps(c, r.steps)[::-1]
    stride = c.num_train_timesteps // r.steps
    rows, levels = [], []
    for k in index:
        now, after = _previous(schedule, k - stride, c.set_alpha_to_one), _at(schedule, k)
        output = _output(after, c.prediction_type, RAW)
        if c.prediction_type == "sample" and now.sigma == 0:
            raise ValueError(
                "prediction_type: 'sample' cannot be inverted from clean data; use "
                "set_alpha_to_one=False"
            )
        x0, eps = _estimates(X, output, now, c.prediction_type)
        x0 = D if c.clip_sample else x0  # as ``transform`` gives it
        rows.append(Row(after, [after.alpha * x0 + after.sigma * eps]))
        levels.append(now)
    sampler = _sampler(c, schedule, index, [*levels, after], table(rows))
    if not c.clip_sample:
        return sampler
    first = 0.0 if c.set_alpha_to_one else 1 / schedule.steps

    def clipped(x: Array, level: NoiseLevel, raw: Array) -> Array:
        """x_0 at the level of x, which is one stride below the level that the network receives."""
        now = schedule(jnp.maximum(level.t - stride / schedule.steps, first))
        output = _output(level, c.prediction_type, raw, x)
        x0, _ = _estimates(x, output, now, c.prediction_type)
        return jnp.clip(x0, -c.clip_sample_range, c.clip_sample_range)

    return sampler._replace(transform=partial(scheduler.on_x0, change=clipped))


def pndm(c: SimpleNamespace, r: Request) -> Sampler:
    """Pseudo linear multistep (``solvers.plms``), with or without the Runge-Kutta start.

    As in diffusers: steps go to t - T // N, the second evaluation repeats the first step (N + 1
    evaluations), a v-prediction's multistep combines v itself, and stages lie T // N // 2 apart.
    """
    schedule = scheduler.table_of(scheduler.alphas_cumprod(c))
    index = timesteps.ddim_timesteps(c, r.steps)[::-1]
    stride = c.num_train_timesteps // r.steps
    if c.skip_prk_steps:
        stages, rest = [], np.concatenate([index[:-1], index[-2:-1], index[-1:]])[::-1]
    else:
        if r.steps < 4:
            raise ValueError(f"steps: skip_prk_steps=False needs at least 4, got {r.steps}")
        pairs = np.repeat(index[-4:], 2) + np.tile([0, stride // 2], 4)
        stages, rest = pairs[:-1].repeat(2)[1:-1][::-1], index[:-3][::-1]
    calls = np.concatenate([np.asarray(stages, np.int64), rest])
    calls = calls[r.start(r.steps) :]
    rows: list[Row] = []
    for number, k in enumerate(calls):
        now = _at(schedule, k)
        output = _output(now, c.prediction_type)
        if len(stages) and number < len(stages):
            base = _at(schedule, stages[number // 4 * 4])
            down = _previous(schedule, k - (0 if number % 2 else stride // 2), c.set_alpha_to_one)
            # Y[1:4]: earlier outputs, newest first; Y[4]: the base point; Y[5]: the weighted sum.
            match number % 4:
                case 0:
                    kept, start, total, used = [output, Y[1], Y[2]], X, output / 6, output
                case 1 | 2:
                    kept, start, total, used = Y[1:4], Y[4], Y[5] + output / 3, output
                case _:
                    kept, start, total = Y[1:4], Y[4], 0 * X
                    used = Y[5] + output / 6
            new = _transfer(start, used, base, down, c.prediction_type)
            rows.append(Row(now, [new, *kept, start, total]))
            continue
        at, before, base = k, k - stride, X
        past = [output, Y[1], Y[2], Y[3]]
        known = 4 if len(stages) else number + (number == 0)
        if number == 1 and not len(stages):  # the first step again, with the mean of both ends
            before, at, base = k, k + stride, Y[4]
            used, past = (output + Y[1]) / 2, [Y[1]]
        else:
            used = sum(w * e for w, e in zip(BASHFORTH[min(known, 4) - 1], past))
        down = _previous(schedule, before, c.set_alpha_to_one)
        new = _transfer(base, used, _at(schedule, at), down, c.prediction_type)
        kept = [*past, *([0 * X] * 3)][:3]
        rows.append(Row(now, [new, *kept, X]))
    levels = [row.level for row in rows]
    grid = [_at(schedule, k) for k in index[::-1]]
    return _sampler(c, schedule, calls, levels, table(rows), [*grid, down])


def _output(now: NoiseLevel, prediction_type: str, d: Array = D, x: Array = X) -> Array:
    """The network's output, from the estimate of x_0 that was made of it."""
    if prediction_type == "epsilon":
        return (x - now.alpha * d) / now.sigma
    return d if prediction_type == "sample" else (now.alpha * x - d) / now.sigma


def _estimates(
    x: Array, output: Array, now: NoiseLevel, prediction_type: str
) -> tuple[Array, Array]:
    """(x_0, eps) from x at ``now`` and this output."""
    if prediction_type == "epsilon":
        return (x - now.sigma * output) / now.alpha, output
    if prediction_type == "sample":
        return output, (x - now.alpha * output) / now.sigma
    return now.alpha * x - now.sigma * output, now.alpha * output + now.sigma * x


def _transfer(
    x: Combination, output: Combination, now: NoiseLevel, after: NoiseLevel, prediction_type: str
) -> Combination:
    """The DDIM step from x at ``now`` with this output."""
    x0, eps = _estimates(x, output, now, prediction_type)
    return after.alpha * x0 + after.sigma * eps


def lcm(c: SimpleNamespace, r: Request) -> Sampler:
    """Multistep consistency sampling of a latent consistency model (``solvers.lcm``).

    Timesteps come from those it was distilled on, T // original_inference_steps apart; strength
    shortens that list, as in diffusers.
    """
    schedule, index = scheduler.table_of(scheduler.alphas_cumprod(c)), _distilled(c, r)
    levels = [*_levels(schedule, index), CLEAN]
    rows = []
    for k, now, after in zip(index, levels, levels[1:]):
        scaled = float(k) * c.timestep_scaling
        skip = 0.25 / (scaled**2 + 0.25)  # sigma_data = 0.5
        f = skip * X + scaled / np.hypot(scaled, 0.5) * D
        rows.append(Row(now, [after.alpha * f + after.sigma * Z]))
    return _sampler(c, schedule, index, levels, table(rows))


def tcd(c: SimpleNamespace, r: Request) -> Sampler:
    """Strategic stochastic sampling of a trajectory consistency model (``one_step.tcd_row``).

    eta (default 0.3, the paper's gamma) is that of diffusers' ``step``. As there, the step down
    ends at table step floor((1 - eta) t'), and x at table step 0, not at clean data.
    """
    schedule, index = scheduler.table_of(scheduler.alphas_cumprod(c)), _distilled(c, r)
    eta = 0.3 if r.eta is None else r.eta
    rows = []
    for k, after in zip(index, [*index[1:], None]):
        below = 0 if after is None else int(np.floor(np.float32(1 - eta) * np.float32(after)))
        target = below if after is None or eta == 0 else after
        rows.append(tcd_row(_at(schedule, k), _at(schedule, below), _at(schedule, target)))
    levels = [*_levels(schedule, index), _at(schedule, 0)]
    return _sampler(c, schedule, index, levels, table(rows))


def _distilled(c: SimpleNamespace, r: Request) -> np.ndarray:
    """The timesteps of ``lcm`` and ``tcd``."""
    total = c.num_train_timesteps
    given, strength = r.original_inference_steps, 1.0 if r.strength is None else r.strength
    original = c.original_inference_steps if given is None else given
    if not 1 <= original <= total:
        raise ValueError(f"original_inference_steps must lie in 1..{total}, got {original}")
    if r.timesteps is not None:
        if r.strength is not None:  # diffusers then takes the last step for one with noise
            raise ValueError("strength: not with timesteps; give the later timesteps alone")
        return timesteps.custom_timesteps(r, total)[r.begin :]
    usable = np.arange(1, int(original * strength) + 1) * (total // original) - 1
    if r.steps > len(usable):
        raise ValueError(
            f"steps: {r.steps} is more than the {len(usable)} that original_inference_steps="
            f"{original} and strength={strength} leave"
        )
    places = np.floor(np.linspace(0, len(usable), r.steps, endpoint=False)).astype(np.int64)
    return usable[::-1][places][r.begin :]


def _at(schedule: scheduler.LogTable, index: int) -> NoiseLevel:
    """The level of a table step 0..T-1."""
    if not 0 <= index < schedule.steps:
        raise ValueError(f"timestep {index} lies outside the table 0..{schedule.steps - 1}")
    t = (int(index) + 1) / schedule.steps
    return NoiseLevel(t, schedule.alphas[index], schedule.sigmas[index])


def _previous(schedule: scheduler.LogTable, index: int, set_alpha_to_one: bool) -> NoiseLevel:
    """The same, where below 0 is clean data or step 0."""
    if index >= 0:
        return _at(schedule, index)
    return CLEAN if set_alpha_to_one else _at(schedule, 0)


def _levels(schedule: scheduler.LogTable, index: np.ndarray) -> list[NoiseLevel]:
    return [_at(schedule, k) for k in index]


def _sampler(
    c: SimpleNamespace,
    schedule: scheduler.LogTable,
    index: np.ndarray,
    levels: list[NoiseLevel],
    solver: Solver,
    grid: list[NoiseLevel] | None = None,
) -> Sampler:
    if c.prediction_type == "epsilon" and np.any(solver.level.alpha == 0):
        raise ValueError(
            "prediction_type: 'epsilon' cannot start where rescale_betas_zero_snr=True leaves no "
            "signal; use v_prediction, or a timestep_spacing that leaves out the last step"
        )
    return Sampler(
        schedule,
        scheduler.PREDICTIONS[c.prediction_type],
        partial(ddpm_index, steps=schedule.steps),
        scheduler.stack(levels if grid is None else grid),
        solver._replace(init=np.float64(1.0)),
        np.asarray(index, np.float64),
        scheduler.transform_of(c),
    )
