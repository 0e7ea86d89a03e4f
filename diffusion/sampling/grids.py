"""Where a sampler evaluates its denoiser: N + 1 noise levels, noisiest first.

A grid is data, a stacked ``NoiseLevel`` of float64 NumPy arrays [N + 1]; solvers turn it into a
table. All but ``from_times`` and ``from_sigmas`` end at clean data, (1, 0), so that N steps are N
evaluations of a one-stage solver. With ``clean=False``, where a grid has that option, N steps end
at the smallest noise level instead. Numbers out of the ranges that are given, and grids that do not
fit the schedule, raise ValueError.

Evenly spaced times are even in the schedule's own time: in the steps of a ``Table``, in sigma
itself on ``EDM``, where ``karras`` is the usual choice. ``leading`` and ``linspace`` end with steps
that are long in log(alpha/sigma), for which solvers of high order have the option ``jump``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from scipy import special

from diffusion.levels import NoiseLevel
from diffusion.schedules import EDM, Schedule, Table


def uniform(schedule: Schedule, steps: int) -> NoiseLevel:
    """Times evenly spaced from t_max to 0: "trailing" spacing (Lin et al., 2023).

    The grid starts at the schedule's noisiest level, which zero terminal SNR, flows and few-step
    models need.
    """
    return from_times(schedule, schedule.t_max * np.linspace(1, 0, _check(steps) + 1))


def leading(schedule: Table, steps: int, offset: int = 0) -> NoiseLevel:
    """Table steps ``offset + i (T // N)``, i = N-1..0, then clean: the first of each stride.

    This is DDIM's and, with offset = 1, Stable Diffusion's spacing. The grid starts up to a stride
    below the noisiest level. Step k lies at t = (k + 1) / T.
    """
    if not isinstance(schedule, Table):
        raise ValueError(
            f"leading needs a schedule with steps (a Table), got {schedule}; uniform needs none"
        )
    total, stride = schedule.steps, schedule.steps // _check_table(schedule, steps)
    last = (steps - 1) * stride
    if not 0 <= offset < total - last:
        raise ValueError(
            f"offset must lie in 0..{total - last - 1} for {steps} of {total} steps, got {offset}"
        )
    index = offset + stride * np.arange(steps)[::-1]
    return from_times(schedule, np.append((index + 1) / total, 0.0))


def linspace(
    schedule: Schedule, steps: int, t_min: float | None = None, clean: bool = True
) -> NoiseLevel:
    """N times evenly spaced from t_max to t_min in (0, t_max], then clean.

    t_min is by default a table's first step and 0.001 t_max on other schedules (Song et al., 2021).
    """
    if isinstance(schedule, Table):
        _check_table(schedule, steps)
    if t_min is None:
        t_min = 1 / schedule.steps if isinstance(schedule, Table) else 1e-3 * schedule.t_max
    if not 0 < t_min <= schedule.t_max:
        raise ValueError(f"t_min must lie in (0, {schedule.t_max}], got {t_min}")
    times = np.linspace(schedule.t_max, t_min, _levels(steps, clean))
    return from_times(schedule, np.append(times, 0.0) if clean else times)


def beta(schedule: Schedule, steps: int, a: float = 0.6, b: float = 0.6) -> NoiseLevel:
    """Times t_max F^-1(1 - i/N), F the Beta(a, b) distribution's (Lee et al., 2024).

    With a, b < 1 the times are dense at both ends; a = b = 1 is ``uniform``. Both are > 0.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"a and b must be positive, got a={a} and b={b}")
    times = special.betaincinv(a, b, np.linspace(1, 0, _check(steps) + 1))
    return from_times(schedule, schedule.t_max * times)


def flow_shift(schedule: Schedule, steps: int, shift: float = 3.0) -> NoiseLevel:
    """Uniform times, moved to where sigma/alpha is ``shift`` times as large.

    SD3 (Esser et al., 2024, eq. 23): t' = shift t / (1 + (shift - 1) t) on the rectified flow. This
    is for schedules without signal at t_max; for others there is ``Schedule.shifted``.
    """
    if schedule(schedule.t_max).alpha > 0:
        raise ValueError(
            f"flow_shift needs no signal at t_max (a flow), got {type(schedule).__name__}; "
            "use schedule.shifted"
        )
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    level = uniform(schedule, steps)
    moved = schedule.invert(level.alpha, shift * level.sigma)
    return from_times(schedule, np.minimum(moved, schedule.t_max))


def flow_shift_for(
    schedule: Schedule,
    steps: int,
    tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> NoiseLevel:
    """``flow_shift`` by the number of tokens, with shift = e^mu (FLUX).

    mu is linear in the tokens: base_shift at 256 (a 256 px image), max_shift at 4096 (1024 px).
    """
    if not tokens >= 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    mu = base_shift + (max_shift - base_shift) * (tokens - 256) / (4096 - 256)
    return flow_shift(schedule, steps, float(np.exp(mu)))


def karras(
    schedule: Schedule,
    steps: int,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    clean: bool = True,
) -> NoiseLevel:
    """sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then 0.

    Karras et al., 2022, eq. 5. Here sigma is the ratio sigma / alpha, on any schedule. A single
    step starts at sigma_max.

    Args:
      rho: > 0; with a larger one, more steps lie at low noise.
      sigma_min: by default ``lowest_noise``.
      sigma_max: by default the schedule's largest ratio, or 80 where that level has practically no
        signal (alpha < 0.001: cosine, zero terminal SNR, flows) and a huge or infinite ratio.
      clean: whether the last step goes to clean data; if not, N steps end at sigma_min.
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    low, high = _range(schedule, sigma_min, sigma_max)
    ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), _levels(steps, clean)) ** rho
    return from_sigmas(schedule, _pin(ramp, low, high, clean))


def exponential(
    schedule: Schedule,
    steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    clean: bool = True,
) -> NoiseLevel:
    """N levels evenly spaced in log(sigma / alpha), then clean: uniform in log SNR.

    This is DPM-Solver's (Lu et al., 2022) and k-diffusion's spacing; arguments as ``karras``.
    """
    low, high = _range(schedule, sigma_min, sigma_max)
    ramp = np.geomspace(high, low, _levels(steps, clean))
    return from_sigmas(schedule, _pin(ramp, low, high, clean))


def from_times(schedule: Schedule, times: Sequence[float] | np.ndarray) -> NoiseLevel:
    """The levels at given times [N + 1], N >= 1, strictly decreasing within [0, t_max]."""
    times = np.asarray(times, np.float64)
    _check_nodes("times", times, schedule.t_max)
    return schedule(times)


def from_sigmas(schedule: Schedule, sigmas: Sequence[float] | np.ndarray) -> NoiseLevel:
    """The levels with the given sigma / alpha [N + 1], N >= 1, strictly decreasing, >= 0.

    The ratios are kept exactly and must not exceed the schedule's largest; t, and the common scale
    of alpha and sigma, come from inverting the schedule.
    """
    ratio = np.asarray(sigmas, np.float64)
    _check_nodes("sigmas", ratio, np.inf)
    noisiest = schedule(np.float64(schedule.t_max))
    if ratio[0] * noisiest.alpha > noisiest.sigma * (1 + 1e-6):
        raise ValueError(
            f"sigmas: {ratio[0]} lies beyond the schedule's sigma_max = {noisiest.ratio:.6g}"
        )
    return schedule.at_ratio(ratio)


def partial(grid: NoiseLevel, strength: float) -> NoiseLevel:
    """The last int(strength N) steps of a grid of N: image to image (SDEdit, Meng et al., 2021).

    diffusers counts them so. strength = 1 is the whole grid; at least one step must be left.
    """
    count = len(grid.sigma) - 1
    if not 0 < strength <= 1 or int(count * strength) < 1:
        raise ValueError(
            f"strength must lie in [1/{count}, 1], so that one of the grid's {count} steps is "
            f"left, got {strength}"
        )
    return NoiseLevel(*(leaf[count - int(count * strength) :] for leaf in grid))


def usual(schedule: Schedule) -> str:
    """The name of the grid that suits a schedule: karras on edm; on others uniform, or exponential
    where half of the times lie in strong noise, as on linear, vp_sde and shifted ones."""
    if isinstance(schedule, EDM):
        return "karras"
    return "exponential" if schedule(0.5 * schedule.t_max).ratio > 1.5 else "uniform"


def lowest_noise(schedule: Schedule) -> float:
    """sigma / alpha of a table's first step; 0.002 on other schedules."""
    return float(schedule(1 / schedule.steps).ratio) if isinstance(schedule, Table) else 0.002


def _range(
    schedule: Schedule, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    if sigma_min is None:
        sigma_min = lowest_noise(schedule)
    if sigma_max is None:
        noisiest = schedule(schedule.t_max)
        sigma_max = float(noisiest.ratio) if noisiest.alpha >= 1e-3 else 80.0
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return sigma_min, sigma_max


def _levels(steps: int, clean: bool) -> int:
    """The number of levels with noise in N steps."""
    return _check(steps) + (not clean)


def _pin(ramp: np.ndarray, low: float, high: float, clean: bool) -> np.ndarray:
    """The ramp with exact ends, which rounding could move off the schedule; then 0 if clean."""
    if len(ramp) > 1:
        ramp[-1] = low
    ramp[0] = high
    return np.append(ramp, 0.0) if clean else ramp


def _check(steps: int) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        raise ValueError(f"steps must be a whole number, got {steps!r}") from None
    if isinstance(steps, bool) or count < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    return count


def _check_table(table: Table, steps: int) -> int:
    if _check(steps) > table.steps:
        raise ValueError(f"steps: {steps} is more than the {table.steps} that the schedule has")
    return steps


def _check_nodes(name: str, nodes: np.ndarray, largest: float) -> None:
    if nodes.ndim != 1 or len(nodes) < 2:
        raise ValueError(f"{name} must be a list of at least two, got shape {nodes.shape}")
    if not np.all(np.isfinite(nodes)) or nodes[-1] < 0 or nodes[0] > largest:
        raise ValueError(f"{name} must lie in [0, {largest}], got {nodes.max()}..{nodes.min()}")
    if np.any(np.diff(nodes) >= 0):
        i = int(np.argmax(np.diff(nodes) >= 0))
        raise ValueError(f"{name} must decrease strictly, got {nodes[i]} then {nodes[i + 1]}")


CHOICES = {
    f.__name__: f
    for f in (
        uniform,
        leading,
        linspace,
        karras,
        exponential,
        beta,
        flow_shift,
        flow_shift_for,
        from_times,
        from_sigmas,
    )
}
