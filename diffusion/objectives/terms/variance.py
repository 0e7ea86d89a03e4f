"""Learned reverse variances (improved DDPM, Nichol & Dhariwal, 2021), which ADM and DiT use.

The network's second output nu in [0, 1] places the log-variance of p(x_s | x_t) between the
posterior's, beta_tilde, and the forward step's, beta. It is trained by the variational bound, one
term of which is drawn per example, with the mean held fixed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from diffusion.levels import Array, NoiseLevel, namespace, posterior
from diffusion.objectives.objective import Context, Measured
from diffusion.objectives.terms.term import Noised
from diffusion.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class VariationalBound:
    """The hybrid loss L_simple + weight * L_vlb, with the bound's T terms summed, in bits per
    dimension.

    Attributes:
      schedule: of the noise; times are multiples of t_max / T.
      steps: T, the number of steps of the chain.
      levels: number of grey levels of the data, for the likelihood at the last step.
    """

    schedule: Schedule
    weight: float = 1e-3
    steps: int = 1000
    levels: int = 256
    name: ClassVar[str] = "variational_bound"
    blocks: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be a finite number >= 0, such as 1e-3")

    def init(self, key: Array, noised: Noised) -> None:
        """The term has no parameters."""

    def __call__(self, loss: Array, params: None, context: Context, noised: Noised) -> Measured:
        """The loss of each example with its bound, and the mean bound."""
        nu = (noised.variance + 1) / 2
        t = self.schedule.argument(noised.level)
        vlb = self.bits(t, noised.batch["x"], noised.x_t, noised.x0_hat, nu)
        return loss + self.weight * vlb, {"vlb": vlb.mean()}

    def bits(self, t: Array, x0: Array, x_t: Array, x0_hat: Array, nu: Array) -> Array:
        """T times the bound's term at the schedule's times t [B], in bits per dimension, [B].

        That is KL(q(x_s | x_t, x_0) || p(x_s | x_t)) with s = t - 1/T, and at the last step,
        where s = 0, the negative log-likelihood of x_0 in bins of width 2 / (levels - 1).
        """
        schedule, width = self.schedule, self.schedule.t_max / self.steps
        # At the last step the posterior is a point; its variance is taken from the step before.
        first = posterior(schedule(jnp.float32(2 * width)), schedule(jnp.float32(width)))[1]
        now, before = schedule(t), schedule(jnp.maximum(t - width, 0.0))
        step = reverse_step(now, before, t / schedule.t_max * self.steps < 1.5, first)
        return self.steps * step_bits(step, x0, x_t, jax.lax.stop_gradient(x0_hat), nu, self.levels)


class ReverseStep(NamedTuple):
    """q(x_s | x_t, x_0) = N(c_x x_t + c_x0 x_0, beta_tilde); leaves (), [B] or [N]."""

    c_x: Array
    c_x0: Array
    log_beta_tilde: Array
    log_beta: Array
    last: Array


def reverse_step(now: NoiseLevel, before: NoiseLevel, last: Array, floor: Array) -> ReverseStep:
    """The step from t (now) to s (before); NumPy or JAX, as the levels.

    ``last`` says whether s = 0, where there is a likelihood of x_0 instead of a KL, and beta_tilde,
    otherwise 0 there, is at least ``floor``.
    """
    xp = namespace(now.sigma, before.sigma)
    beta, beta_tilde, c_x, c_x0 = posterior(now, before)
    return ReverseStep(c_x, c_x0, xp.log(xp.maximum(beta_tilde, floor)), xp.log(beta), last)


def step_bits(
    step: ReverseStep, x0: Array, x_t: Array, x0_hat: Array, nu: Array, levels: int | None
) -> Array:
    """One step's term of the bound in bits per dimension, [B].

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or at the last step -log p(x_0 | x_t).

    Args:
      step, x0, x_t, x0_hat: [B, ...].
      nu: [B, ...] or [B, 1, ...], where p's log-variance lies between beta_tilde's and beta's.
      levels: of x0, whose bins have width 2 / (levels - 1); None: a density, not binned.
    """
    step = ReverseStep(*(a.reshape((-1,) + (1,) * (x0.ndim - 1)) for a in step))
    mean, mean_hat = (step.c_x * x_t + step.c_x0 * x for x in (x0, x0_hat))
    log_variance = nu * step.log_beta + (1 - nu) * step.log_beta_tilde
    error = mean - mean_hat
    gap = step.log_beta_tilde - log_variance
    kl = 0.5 * (-1 - gap + jnp.exp(gap) + error**2 * jnp.exp(-log_variance))
    if levels is None:
        nll = -norm.logpdf(x0, mean_hat, jnp.exp(log_variance / 2))
    else:
        nll = -_binned_log_likelihood(x0, mean_hat, log_variance / 2, levels)
    term = jnp.where(step.last, nll, kl)
    return term.reshape(len(x0), -1).mean(axis=1) / jnp.log(2.0)


def _binned_log_likelihood(x: Array, mean: Array, log_std: Array, levels: int) -> Array:
    """log of the Gaussian's mass in x's bin; the outermost bins are open (DDPM, eq. 13)."""
    half = 1.0 / (levels - 1)
    inverse = jnp.exp(-log_std)
    far = 1e4  # standard deviations; infinity would give NaN gradients
    upper = jnp.where(x > 1 - half, far, (x + half - mean) * inverse)
    lower = jnp.where(x < -1 + half, -far, (x - half - mean) * inverse)
    # Mirror the right tail to the left, where differences of the cdf keep their precision.
    flip = lower > 0
    low, high = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_high, log_low = norm.logcdf(high), norm.logcdf(low)
    return log_high + jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))
