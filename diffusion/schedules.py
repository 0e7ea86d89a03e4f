"""Noise schedules: how much signal and how much noise there is at each time.

A schedule is a frozen dataclass ``t -> NoiseLevel``, continuous in ``t``: ``t = 0`` is clean data,
``t_max`` the noisiest time. Its inverse takes the *pair* ``(alpha, sigma)``, so that it also holds
at both ends, where their ratio is 0 or infinite.

All functions return the kind of their argument: float64 NumPy for NumPy (grids and solver tables,
on the host), JAX for JAX (traceable, differentiable for t > 0).

Tables of T steps put step k = 0..T-1 at ``t = (k + 1) / T`` and clean data, (1, 0), at t = 0.
Between two steps the point (alpha, sigma) moves along the chord and is put back on the unit
circle, which is exact at the steps, finite at both ends and invertible in closed form.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel, namespace

FAR = 1e12  # largest sigma, and largest factor of sigma: their squares are finite in float32


def _asarrays(*values: Any) -> tuple[ModuleType, list[Array]]:
    """Host values become float64 NumPy arrays; a JAX value makes everything JAX."""
    xp = namespace(*values)
    dtype = np.float64 if xp is np else jnp.result_type(float)
    return xp, [xp.asarray(v, dtype) for v in values]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules: ``schedule(t)``, ``schedule.invert(alpha, sigma)``, ``shifted``."""

    @property
    def t_max(self) -> float:
        """The noisiest time."""
        return 1.0

    def __call__(self, t: Array | float) -> NoiseLevel:
        """The noise level at times t in [0, t_max], of any shape."""
        xp, (t,) = _asarrays(t)
        return NoiseLevel(t, *self._scales(t, xp))

    def invert(self, alpha: Array | float, sigma: Array | float) -> Array:
        """The time t at which alpha(t) : sigma(t) equals the given proportion (any shape)."""
        xp, (alpha, sigma) = _asarrays(alpha, sigma)
        return self._time(alpha, sigma, xp)

    def argument(self, level: NoiseLevel) -> Array:
        """The time t at which this schedule is ``level``, one of its own levels, in every leaf.

        That is ``level.t``, except on a ``Shifted`` schedule, whose levels have the moved time.
        """
        return level.t

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        """alpha(t) and sigma(t), by NumPy or jax.numpy."""
        raise NotImplementedError

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        """The inverse of ``_scales``."""
        raise NotImplementedError

    def at_ratio(self, ratio: Array | float) -> NoiseLevel:
        """The levels of exactly this sigma / alpha: finite, >= 0, of any shape; on the host."""
        ratio = np.asarray(ratio, np.float64)
        level = self(np.minimum(self.invert(np.ones_like(ratio), ratio), self.t_max))
        # Keep the larger of the two, and with it the schedule's scale; the other follows exactly.
        noisy = ratio > 1
        alpha = np.where(noisy, level.sigma / np.where(noisy, ratio, 1), level.alpha)
        return NoiseLevel(level.t, alpha, np.where(noisy, level.sigma, level.alpha * ratio))

    def shifted(self, shift: float) -> Schedule:
        """The schedule with sigma / alpha multiplied by ``shift`` (> 1: noisier, for large images).

        Simple diffusion (Hoogeboom et al., 2023) writes it as log SNR + 2 log(1 / shift), SD3
        (Esser et al., 2024, eq. 23) as t' = shift t / (1 + (shift - 1) t), which is the same on
        the rectified flow. The level's ``t`` is the moved one, the input of SD3's network;
        ``argument`` gives back the time before the move.
        """
        return Shifted(self, float(shift))


@dataclasses.dataclass(frozen=True)
class Shifted(Schedule):
    """``base`` at the times where its sigma / alpha is ``shift`` times as large."""

    base: Schedule
    shift: float

    def __post_init__(self):
        check_range("shift", self.shift, 0, FAR, above=True)
        if isinstance(self.base, Table) and self.shift > 1 and self.base.alphas[-1] > 0:
            raise ValueError("times cannot move beyond a table's last step; use table.shifted()")

    @property
    def t_max(self) -> float:
        return self.base.t_max

    def __call__(self, t: Array | float) -> NoiseLevel:
        level = self.base(t)
        return self.base(self.base.invert(level.alpha, self.shift * level.sigma))

    def argument(self, level: NoiseLevel) -> Array:
        """``Schedule.argument``: the time whose move gives ``level``."""
        t = self.invert(level.alpha, level.sigma)
        return namespace(t).minimum(t, self.t_max)

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        return self.base.invert(self.shift * alpha, sigma)


@dataclasses.dataclass(frozen=True, eq=False)
class Table(Schedule):
    """A variance-preserving schedule given at T steps (DDPM, Stable Diffusion).

    Attributes:
      alphas: [T] sqrt of the cumulative product, decreasing, in [0, 1).
      sigmas: [T] sqrt(1 - alphas^2); computed from the betas it is more accurate than from alphas.
    """

    alphas: np.ndarray
    sigmas: np.ndarray

    def __post_init__(self):
        alphas, sigmas = (np.asarray(a, np.float64) for a in (self.alphas, self.sigmas))
        if alphas.ndim != 1 or alphas.shape != sigmas.shape or alphas.size == 0:
            raise ValueError(f"expected two arrays [T], got {alphas.shape} and {sigmas.shape}")
        if not (np.all(np.diff(alphas) < 0) and alphas[0] < 1 and alphas[-1] >= 0):
            raise ValueError("alphas must decrease strictly within [0, 1)")
        if not np.abs(alphas**2 + sigmas**2 - 1).max() <= 1e-6:
            raise ValueError("alphas^2 + sigmas^2 must be 1")
        object.__setattr__(self, "alphas", alphas)
        object.__setattr__(self, "sigmas", sigmas)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alphas)

    @cached_property
    def _nodes(self) -> np.ndarray:
        """[2, T + 1]: (alpha, sigma) at t = k / T, clean data first."""
        return np.stack([np.append(1.0, self.alphas), np.append(0.0, self.sigmas)])

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        nodes = xp.asarray(self._nodes, t.dtype)
        position = t * self.steps
        k = xp.clip(xp.floor(position), 0, self.steps - 1).astype(np.int32)
        w = position - k
        alpha, sigma = (1 - w) * nodes[:, k] + w * nodes[:, k + 1]
        norm = xp.sqrt(alpha**2 + sigma**2)
        return alpha / norm, sigma / norm

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        nodes = xp.asarray(self._nodes, alpha.dtype)
        angle = xp.arctan2(sigma, alpha)
        k = xp.searchsorted(xp.arctan2(nodes[1], nodes[0]), angle, side="right") - 1
        k = xp.clip(k, 0, self.steps - 1)
        # Where the ray (alpha, sigma) crosses the chord from node k to node k + 1.
        before = sigma * nodes[0, k] - alpha * nodes[1, k]
        after = sigma * nodes[0, k + 1] - alpha * nodes[1, k + 1]
        w = xp.clip(before / (before - after), 0.0, 1.0)
        return (k + w) / self.steps

    def shifted(self, shift: float) -> Table:
        """``Schedule.shifted`` by a change of the table: moved times would end before its last
        step, or be dense there."""
        check_range("shift", shift, 0, FAR, above=True)
        norm = np.hypot(self.alphas, shift * self.sigmas)
        return Table(self.alphas / norm, shift * self.sigmas / norm)


def from_betas(betas: np.ndarray) -> Table:
    """The table of q(x_k | x_{k-1}) = N(sqrt(1 - beta_k) x_{k-1}, beta_k); betas [T] in (0, 1)."""
    betas = np.asarray(betas, np.float64)
    if not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"betas must lie in (0, 1), got {betas.min()}..{betas.max()}")
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return Table(np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar)))


def _from_alpha_bar(alpha_bar: np.ndarray, max_beta: float) -> Table:
    """From cumulative products [T + 1] (clean first), each step's beta at most max_beta."""
    return from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Table:
    """Betas evenly spaced (DDPM, Ho et al., 2020)."""
    _check_steps(steps)
    return from_betas(np.linspace(beta_start, beta_end, steps))


def scaled_linear(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Table:
    """Square roots of the betas evenly spaced (latent diffusion, Stable Diffusion's defaults)."""
    _check_steps(steps)
    check_range("beta_start", beta_start, 0, 1, above=True)
    check_range("beta_end", beta_end, 0, 1, above=True)
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)


def cosine(steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Table:
    """alpha_bar = cos^2((t + s) / (1 + s) * pi / 2), normalised (Nichol & Dhariwal, 2021)."""
    _check_steps(steps)
    check_range("offset", offset, 0)
    check_range("max_beta", max_beta, 0, 1, above=True)
    t = np.linspace(0, 1, steps + 1)
    return _from_alpha_bar(np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2, max_beta)


def sigmoid(
    steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> Table:
    """alpha_bar falls along a sigmoid, start to end, at temperature tau (Jabri et al., 2022)."""
    _check_steps(steps)
    check_range("tau", tau, 0, above=True)
    if not start < end:
        raise ValueError(f"start={start} must be less than end={end}")
    logistic = 1 / (1 + np.exp(-np.linspace(start, end, steps + 1) / tau))
    return _from_alpha_bar((logistic[-1] - logistic) / (logistic[-1] - logistic[0]), max_beta)


def zero_terminal_snr(table: Schedule) -> Table:
    """Shifts and scales alpha so that the last step holds no signal (Lin et al., 2023, alg. 1).

    The first step is kept. The last is exactly (0, 1), so eps-prediction cannot start there.
    """
    if not isinstance(table, Table) or table.steps < 2:
        raise ValueError(
            "zero_terminal_snr changes a table of at least two steps: linear, scaled_linear, "
            f"cosine or sigmoid; got {table}"
        )
    first, last = table.alphas[0], table.alphas[-1]
    alphas = (table.alphas - last) * (first / (first - last))
    return Table(alphas, np.sqrt(1 - alphas**2))


@dataclasses.dataclass(frozen=True)
class VPSDE(Schedule):
    """dx = -beta/2 x dt + sqrt(beta) dw, beta linear in t in [0, 1] (Song et al., 2021, eq. 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        check_range("beta_min", self.beta_min, 0)
        check_range("beta_max", self.beta_max, self.beta_min, 100)
        check_range("beta_max", self.beta_max, 0, above=True)

    def _log_alpha(self, t: Array) -> Array:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _time_at(self, minus_log_alpha: Array, xp: ModuleType) -> Array:
        slope, start = self.beta_max - self.beta_min, self.beta_min / 2
        return 2 * minus_log_alpha / (start + xp.sqrt(start**2 + slope * minus_log_alpha))

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        log_alpha = self._log_alpha(t)
        return xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        return self._time_at(0.5 * xp.log1p((sigma / alpha) ** 2), xp)


@dataclasses.dataclass(frozen=True)
class SubVPSDE(VPSDE):
    """The VP-SDE's alpha with the smaller sigma = 1 - alpha^2 (Song et al., 2021, eq. 33)."""

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        log_alpha = self._log_alpha(t)
        return xp.exp(log_alpha), -xp.expm1(2 * log_alpha)

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        return self._time_at(xp.arcsinh(sigma / alpha / 2), xp)  # sigma/alpha = 2 sinh(-log alpha)


@dataclasses.dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding, alpha = 1, geometric (Song et al., 2021, eq. 30).

    sigma = sigma_min sqrt((sigma_max / sigma_min)^(2t) - 1): the SDE's exact marginal, clean at
    t = 0. (Their code drops the -1, which matters only near t = 0.)
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        check_range("sigma_min", self.sigma_min, 0, above=True)
        check_range("sigma_max", self.sigma_max, self.sigma_min, FAR, above=True)
        check_range("sigma_max / sigma_min", self.sigma_max / self.sigma_min, 1, FAR**2)

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        growth = 2 * np.log(self.sigma_max / self.sigma_min)
        return xp.ones_like(t), self.sigma_min * xp.sqrt(xp.expm1(growth * t))

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        growth = 2 * np.log(self.sigma_max / self.sigma_min)
        return xp.log1p((sigma / alpha / self.sigma_min) ** 2) / growth


@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma = t in [0, sigma_max] (Karras et al., 2022): time *is* the noise level."""

    sigma_max: float = 80.0

    def __post_init__(self):
        check_range("sigma_max", self.sigma_max, 0, FAR, above=True)

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        return xp.ones_like(t), t

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        return sigma / alpha

    def shifted(self, shift: float) -> EDM:
        """``Schedule.shifted``: sigma_max is multiplied, and every sigma keeps its time."""
        check_range("shift", shift, 0, FAR, above=True)
        return EDM(self.sigma_max * shift)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t in [0, 1] (Liu et al., 2022; Lipman et al., 2022)."""

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        return 1 - t, t

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        return sigma / (alpha + sigma)


@dataclasses.dataclass(frozen=True)
class TrigonometricFlow(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1] (Albergo & Vanden-Eijnden, 2022;
    TrigFlow, Lu & Song, 2024, writes the angle itself as time)."""

    def _scales(self, t: Array, xp: ModuleType) -> tuple[Array, Array]:
        # cos as the sine of the complement: relative accuracy at t = 1 too.
        return xp.sin(np.pi / 2 * (1 - t)), xp.sin(np.pi / 2 * t)

    def _time(self, alpha: Array, sigma: Array, xp: ModuleType) -> Array:
        return xp.arctan2(sigma, alpha) * (2 / np.pi)


def shifted(schedule: Schedule, shift: float) -> Schedule:
    """``Schedule.shifted``, as a function."""
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"expected a schedule and a number, as in shifted(cosine, 2), not {schedule}"
        )
    return schedule.shifted(shift)


def _check_steps(steps: int) -> None:
    check_range("steps", steps, 1, 100_000)


_FUNCTIONS = (linear, scaled_linear, cosine, sigmoid, zero_terminal_snr, shifted)
CHOICES = {f.__name__: f for f in _FUNCTIONS} | {
    "vp_sde": VPSDE,
    "sub_vp_sde": SubVPSDE,
    "ve": VE,
    "edm": EDM,
    "rectified_flow": RectifiedFlow,
    "trigonometric_flow": TrigonometricFlow,
}
