"""diffusers' three ways to choose timesteps, and its sigmas.

The classes differ: DDPM and DDIM round "linspace" to table steps, the k-diffusion classes do not,
and the DPM family counts one step more and leaves out the last. Sigma is sigma/alpha throughout.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from scipy import special

from diffusion.levels import NoiseLevel
from diffusion.pretrained.schedulers.scheduler import LogTable, Request, sigma_to_t

STILL = 1e-9
"""Relative length of the last step where diffusers repeats its last sigma and does nothing."""


def ddim_timesteps(c: SimpleNamespace, steps: int) -> np.ndarray:
    """[N] table steps, descending (DDPM, DDIM, PNDM)."""
    total = c.num_train_timesteps
    if steps > total:
        raise ValueError(f"steps: {steps} is more than num_train_timesteps={total}")
    if c.timestep_spacing == "linspace":
        index = np.linspace(0, total - 1, steps).round()[::-1]
    elif c.timestep_spacing == "leading":
        index = np.arange(steps)[::-1] * (total // steps) + c.steps_offset
    else:
        index = np.round(np.arange(total, 0, -total / steps)) - 1
    return in_table(index, total)


def in_table(index: np.ndarray, total: int) -> np.ndarray:
    """Checks that timesteps are whole numbers in 0..T-1."""
    index = np.asarray(index).astype(np.int64)
    if index.min() < 0 or index.max() >= total:
        raise ValueError(
            f"timesteps {index.max()}..{index.min()} leave the table 0..{total - 1}: take fewer "
            "steps or a smaller steps_offset"
        )
    return index


def custom_timesteps(r: Request, total: int) -> np.ndarray:
    """The caller's own, descending table steps."""
    index = in_table(r.timesteps, total)
    if np.any(np.diff(index) >= 0):
        raise ValueError(f"timesteps must descend, got {list(r.timesteps)}")
    return index


def k_timesteps(c: SimpleNamespace, r: Request) -> np.ndarray:
    """[N] float32, not rounded, descending (Euler, Heun, LMS, KDPM2)."""
    total, steps = c.num_train_timesteps, r.count
    if r.timesteps is not None:
        return np.asarray(r.timesteps, np.float32)
    if c.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps, dtype=np.float32)[::-1]
    if c.timestep_spacing == "leading":
        return (np.arange(steps)[::-1] * (total // steps) + c.steps_offset).astype(np.float32)
    return (np.arange(total, 0, -total / steps).round() - 1).astype(np.float32)


def dpm_timesteps(c: SimpleNamespace, r: Request, last: int) -> np.ndarray:
    """[N] table steps, descending, the noisiest below ``last`` (DPM-Solver, UniPC, DEIS, SA)."""
    total, steps = c.num_train_timesteps, r.count
    if r.timesteps is not None:
        return custom_timesteps(r, total)
    spacing = getattr(c, "timestep_spacing", "linspace")
    if spacing == "linspace":
        index = np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        index = np.arange(steps + 1)[::-1][:-1] * (last // (steps + 1)) + c.steps_offset
    else:
        index = np.arange(last, 0, -total / steps).round() - 1
    return in_table(index, total)


def last_timestep(c: SimpleNamespace, products: np.ndarray) -> int:
    """T less the steps whose lambda = log(alpha/sigma) lies below ``lambda_min_clipped``."""
    lam = np.log(np.sqrt(products)) - np.log(np.sqrt(1 - products))
    clipped = np.searchsorted(lam[::-1], getattr(c, "lambda_min_clipped", -np.inf))
    return int(c.num_train_timesteps - clipped)


def ratios(products: np.ndarray) -> np.ndarray:
    """[T] sigma/alpha in float32."""
    return np.sqrt((1 - products) / products)


def spread(c: SimpleNamespace, first: float, last: float, steps: int) -> np.ndarray | None:
    """[N] sigmas from first to last by use_{karras,exponential,beta}_sigmas; None without these.

    A config's own sigma_min and sigma_max come before first and last.
    """
    low = last if getattr(c, "sigma_min", None) is None else c.sigma_min
    high = first if getattr(c, "sigma_max", None) is None else c.sigma_max
    ramp = np.linspace(0, 1, steps)
    if c.use_karras_sigmas:
        return karras(ramp, low, high, 7.0)
    if c.use_exponential_sigmas:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    if c.use_beta_sigmas:  # quantiles of Beta(0.6, 0.6) (Lee et al., 2024)
        return low + special.betaincinv(0.6, 0.6, 1 - ramp) * (high - low)
    return None


def karras(ramp: np.ndarray, low: float, high: float, rho: float) -> np.ndarray:
    """Karras et al., 2022, eq. 5, at ramp in [0, 1] from high to low."""
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def log_times(sigmas: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Their places among the table's sigmas."""
    return sigma_to_t(np.asarray(sigmas, np.float64), np.log(ratios(products)))


def table_grid(table: LogTable, index: np.ndarray, sigmas: np.ndarray) -> NoiseLevel:
    """The grid of sigmas [N + 1], at which the network receives the timesteps index [N]."""
    sigmas = still(np.asarray(sigmas, np.float32).astype(np.float64))
    end = table.invert(1.0, sigmas[-1]) if sigmas[-1] > 0 else 0.0
    t = np.append((np.asarray(index, np.float64) + 1) / table.steps, end)
    alpha = 1 / np.sqrt(1 + sigmas**2)
    return NoiseLevel(t, alpha, sigmas * alpha)


def flow_grid(index: np.ndarray, sigmas: np.ndarray, total: int) -> NoiseLevel:
    """The same on the rectified flow, alpha = 1 - sigma."""
    sigmas = still(np.asarray(sigmas, np.float32).astype(np.float64))
    t = np.append(np.asarray(index, np.float64) / total, sigmas[-1])
    return NoiseLevel(t, 1 - sigmas, sigmas)


def still(sigmas: np.ndarray) -> np.ndarray:
    """The sigmas [N + 1], which fall or rise throughout, a repeated last one moved by ``STILL``."""
    if len(sigmas) > 1 and sigmas[-1] == sigmas[-2]:
        rising = len(sigmas) > 2 and sigmas[-2] > sigmas[-3]
        sigmas[-1] *= 1 + STILL if rising else 1 - STILL
    steps = np.diff(sigmas)
    if not (np.all(steps < 0) or np.all(steps > 0)):
        i = int(np.argmax(steps * steps[0] <= 0))
        raise ValueError(
            f"steps: sigma must change in every step, but goes from {sigmas[i]:.6g} to "
            f"{sigmas[i + 1]:.6g} in step {i} of {len(steps)}; take fewer steps, or check "
            "timesteps, sigmas, sigma_min and sigma_max"
        )
    return sigmas
