"""Learned reverse variances (improved DDPM, Nichol & Dhariwal, 2021), which ADM and DiT use.

The network's second output nu in [0, 1] places the log-variance of p(x_s | x_t) between the
posterior's, beta_tilde, and the forward step's, beta. It is trained by the variational bound, one
term of which is drawn per example, with the mean held fixed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from diffusion.levels import Array, posterior
from diffusion.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class VariationalBound:
    """The hybrid loss's second term.

    Attributes:
      steps: T, the number of steps of the chain; times are rounded up to multiples of 1/T.
      weight: lambda of L_simple + lambda L_vlb, where L_vlb is the bound's T terms summed, in bits
        per dimension.
      levels: number of grey levels of the data, for the likelihood at the last step.
    """

    steps: int = 1000
    weight: float = 1e-3
    levels: int = 256

    def __call__(
        self, schedule: Schedule, t: Array, x0: Array, x_t: Array, x0_hat: Array, nu: Array
    ) -> Array:
        """T times the bound's term at times t [B], in bits per dimension, [B].

        That is KL(q(x_s | x_t, x_0) || p(x_s | x_t)) with s = t - 1/T, and at the last step,
        where s = 0, the negative log-likelihood of x_0 in bins of width 2 / (levels - 1).
        """
        last = t / schedule.t_max * self.steps < 1.5
        mean, log_beta_tilde, log_beta = self._posterior(schedule, t, x_t)
        log_variance = nu * log_beta + (1 - nu) * log_beta_tilde
        error = mean(x0) - mean(jax.lax.stop_gradient(x0_hat))
        gap = log_beta_tilde - log_variance
        kl = 0.5 * (-1 - gap + jnp.exp(gap) + error**2 * jnp.exp(-log_variance))
        nll = -_binned_log_likelihood(
            x0, mean(jax.lax.stop_gradient(x0_hat)), log_variance / 2, self.levels
        )
        term = jnp.where(last.reshape((-1,) + (1,) * (x0.ndim - 1)), nll, kl)
        return self.steps * term.reshape(len(x0), -1).mean(axis=1) / jnp.log(2.0)

    def _posterior(self, schedule: Schedule, t: Array, x_t: Array):
        step = schedule.t_max / self.steps
        now, before = schedule(t), schedule(jnp.maximum(t - step, 0.0))
        beta, beta_tilde, c_x, c_x0 = (
            a.reshape((-1,) + (1,) * (x_t.ndim - 1)) for a in posterior(now, before)
        )
        # At the last step the posterior is a point; its variance is taken from the step before.
        _, first, _, _ = posterior(schedule(jnp.float32(2 * step)), schedule(jnp.float32(step)))
        log_beta_tilde = jnp.log(jnp.maximum(beta_tilde, first))
        return (lambda x0: c_x * x_t + c_x0 * x0), log_beta_tilde, jnp.log(beta)


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
