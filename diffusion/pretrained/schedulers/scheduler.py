"""The common parts of all classes: the result, float32 tables, predictions, transforms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion import predictions
from diffusion.denoiser import Denoise, Estimate
from diffusion.levels import Array, NoiseLevel
from diffusion.predictions import Prediction
from diffusion.sampling.guidance import clip, dynamic_threshold
from diffusion.sampling.guidance.transform import on_estimate
from diffusion.sampling.tables import Solver
from diffusion.schedules import Schedule, Table


class Sampler(NamedTuple):
    """A ``scheduler_config.json`` in this library's terms.

    ``sample`` runs ``sampler.solver`` on ``denoiser(network, sampler.prediction,
    sampler.c_noise)``, first guided and then transformed by ``sampler.transform``.

    Attributes:
      schedule: t -> NoiseLevel, on which the network was trained.
      prediction: the meaning of its output.
      c_noise: level -> the timestep that the network receives.
      grid: [N + 1] the levels of the steps; at the last one x ends.
      solver: the table; ``solver.init`` is the initial x's standard deviation here.
      timesteps: [R] diffusers' ``timesteps``, one per evaluation.
      transform: Denoise -> Denoise, clipping or thresholding; it comes after guidance.
      scales: (start, end): x here is diffusers' latents times this. Not 1 for classes that step
        in sigma space, where x is alpha times their latents. Without initial noise, x_init is
        ``diffuse(x0, noise, level)`` at ``solver.level[0]``.
    """

    schedule: Schedule
    prediction: Prediction
    c_noise: Callable[[NoiseLevel], Array]
    grid: NoiseLevel
    solver: Solver
    timesteps: np.ndarray
    transform: Callable[[Denoise], Denoise]
    scales: tuple[float, float] = (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of diffusers' ``set_timesteps`` and ``step``; None for those not given."""

    steps: int | None = None
    timesteps: np.ndarray | None = None
    sigmas: np.ndarray | None = None
    mu: float | None = None
    strength: float | None = None
    eta: float | None = None
    use_clipped_model_output: bool | None = None
    original_inference_steps: int | None = None
    begin: int | None = None

    @property
    def count(self) -> int:
        """N, from steps or the lists."""
        if self.steps is not None:
            return self.steps
        return len(self.timesteps if self.timesteps is not None else self.sigmas)

    def start(self, count: int) -> int:
        """The first of N steps to run, as in diffusers' image-to-image pipelines."""
        if self.strength is None:
            return self.begin or 0
        return count - min(int(count * self.strength), count)


def alphas_cumprod(c: SimpleNamespace, floor: bool = False) -> np.ndarray:
    """[T] the products of 1 - beta, rounded as diffusers' float32 tables are.

    ``floor``: with zero terminal SNR the last is 2^-24 instead of 0, so that sigma is finite.
    """
    one, steps = np.float32(1), c.num_train_timesteps
    if c.trained_betas is not None:
        betas = np.asarray(c.trained_betas, np.float32)
        if betas.shape != (steps,):
            raise ValueError(
                f"trained_betas must have num_train_timesteps={steps} entries, got {betas.shape}"
            )
    elif c.beta_schedule == "linear":
        betas = _linspace32(c.beta_start, c.beta_end, steps)
    elif c.beta_schedule == "scaled_linear":
        betas = _linspace32(c.beta_start**0.5, c.beta_end**0.5, steps) ** 2
    elif c.beta_schedule == "sigmoid":
        z = _linspace32(-6, 6, steps)
        betas = one / (one + np.exp(-z)) * np.float32(c.beta_end - c.beta_start)
        betas += np.float32(c.beta_start)
    else:
        betas = _betas_of(ALPHA_BARS[c.beta_schedule], steps)
    if getattr(c, "rescale_betas_zero_snr", False):
        root = np.sqrt(_cumprod32(one - betas))
        first, last = root[0], root[-1]
        root = (root - last) * (first / (first - last))
        products = root**2
        betas = one - np.append(products[:1], products[1:] / products[:-1])
    products = _cumprod32(one - betas)
    if floor and getattr(c, "rescale_betas_zero_snr", False):
        products[-1] = 2.0**-24
        if products[-2] <= products[-1]:
            raise ValueError(
                "rescale_betas_zero_snr: with these betas the second last product, "
                f"{products[-2]:.3g}, is below 2^-24, which diffusers gives the last; use "
                "DDIMScheduler or other betas"
            )
    return products


def _linspace32(start: float, end: float, steps: int) -> np.ndarray:
    """As torch.linspace: with a float32 step, and each half counted from its own end."""
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(max(steps - 1, 1)))
    i = np.arange(steps)
    forward, backward = start + step * i, end - step * (steps - 1 - i)
    return np.where(i < steps // 2, forward, backward).astype(np.float32)


def _cumprod32(x: np.ndarray) -> np.ndarray:
    return np.cumprod(x.astype(np.float64)).astype(np.float32)


def _laplace(t: float) -> float:
    log = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(log) / (1 + math.exp(log)))


ALPHA_BARS = {
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "laplace": _laplace,
    "exp": lambda t: math.exp(-12.0 * t),
}


def _betas_of(alpha_bar: Callable[[float], float], steps: int) -> np.ndarray:
    values = [alpha_bar(i / steps) for i in range(steps + 1)]
    betas = [min(1 - after / now, 0.999) for now, after in pairwise(values)]
    return np.asarray(betas, np.float32)


class LogTable(Table):
    """A table that is inverted as in diffusers: time is linear in log(sigma/alpha) between its
    steps, and limited to the first and the last."""

    def invert(self, alpha: Array | float, sigma: Array | float) -> np.ndarray:
        """As ``Schedule.invert``, on the host."""
        ratio = np.asarray(sigma, np.float64) / np.asarray(alpha, np.float64)
        return (sigma_to_t(ratio, np.log(self.sigmas / self.alphas)) + 1) / self.steps

    def at_ratio(self, ratio: Array | float) -> NoiseLevel:
        ratio = np.asarray(ratio, np.float64)
        alpha = 1 / np.sqrt(1 + ratio**2)
        return NoiseLevel(self.invert(1.0, ratio), alpha, ratio * alpha)


def table_of(products: np.ndarray) -> LogTable:
    """The schedule of float32 products."""
    products = products.astype(np.float64)
    return LogTable(np.sqrt(products), np.sqrt(1 - products))


def sigma_to_t(sigma: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """The index in [0, T - 1] at which log_sigmas [T] has log(sigma), any shape."""
    log_sigma = np.log(np.maximum(sigma, 1e-10))
    low = np.clip(np.searchsorted(log_sigmas, log_sigma, "right") - 1, 0, len(log_sigmas) - 2)
    weight = (log_sigmas[low] - log_sigma) / (log_sigmas[low] - log_sigmas[low + 1])
    weight = np.clip(weight, 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def scaled_time(level: NoiseLevel, steps: int = 1000) -> Array:
    """steps * t (flows)."""
    return steps * level.t


def reversed_time(level: NoiseLevel, steps: int = 1000) -> Array:
    """steps * (1 - t): flows whose own time runs from noise to data."""
    return steps * (1 - level.t)


def log_sigma_1000(level: NoiseLevel) -> Array:
    """1000 log(sigma / alpha) / 4 (consistency models)."""
    return 250 * jnp.log(level.ratio)


def reversed_flow(level: NoiseLevel) -> predictions.Row:
    """x_0 - eps, the flow's velocity from noise to data."""
    row = predictions.flow(level)
    return row._replace(a=-row.a, b=-row.b)


def negative_edm(level: NoiseLevel, sigma_data: float = 0.5) -> predictions.Row:
    """EDM's preconditioning with c_out negated (diffusers' v_prediction in the EDM classes)."""
    row = predictions.edm(level, sigma_data)
    return row._replace(a=-row.a, b=-row.b)


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": predictions.eps,
    "sample": predictions.x0,
    "original_sample": predictions.x0,
    "v_prediction": predictions.v,
    "flow_prediction": predictions.flow,
}


def unchanged(denoise: Denoise) -> Denoise:
    """No clipping."""
    return denoise


def threshold(denoise: Denoise, quantile: float, largest: float) -> Denoise:
    """``guidance.dynamic_threshold``, in which ``largest`` wins where it is below 1, as in
    diffusers: x_0_hat is then clipped to [-largest, largest] and divided by it."""
    if largest >= 1:
        return dynamic_threshold(denoise, quantile, largest)
    return on_x0(denoise, lambda x, level, x0: jnp.clip(x0, -largest, largest) / largest)


def on_x0(denoise: Denoise, change: Callable[[Array, NoiseLevel, Array], Array]) -> Denoise:
    """x_0_hat := change(x, level, x_0_hat); ``unclipped`` keeps the value before."""

    def changed(x: Array, level: NoiseLevel, e: Estimate) -> Estimate:
        return Estimate(change(x, level.expand(x.ndim), e.x0), e.nu, e.x0)

    return on_estimate(denoise, changed)


def transform_of(c: SimpleNamespace) -> Callable[[Denoise], Denoise]:
    """Thresholding, or else clipping, according to the config."""
    fields = vars(c)
    if fields.get("thresholding"):
        return partial(threshold, quantile=c.dynamic_thresholding_ratio, largest=c.sample_max_value)
    if fields.get("clip_sample"):
        return partial(clip, low=-c.clip_sample_range, high=c.clip_sample_range)
    return unchanged


def stack(levels: Sequence[NoiseLevel]) -> NoiseLevel:
    """Levels one by one -> leaves [N]."""
    return NoiseLevel(*(np.array(leaf, np.float64) for leaf in zip(*levels)))


def part(grid: NoiseLevel, start: int) -> NoiseLevel:
    """The grid from node ``start`` on."""
    return NoiseLevel(*(leaf[start:] for leaf in grid))
