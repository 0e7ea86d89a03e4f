"""Loss weightings: how much each noise level counts.

A weighting is ``(level, c_out) -> w``, the factor of the loss between network output and target,
||F - F*||^2. Papers state most of them as a factor g of the error in x_0; as x_0_hat - x_0 =
c_out (F - F*), these return c_out^2 g.  (An error in eps is alpha / sigma times that in x_0: a
factor of the eps-error is multiplied by the SNR first.) So a weighting means the same whatever
the prediction.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.levels import Array, NoiseLevel
from diffusion.schedules import Schedule

Weighting = Callable[[NoiseLevel, Array], Array]


def simple(level: NoiseLevel, c_out: Array) -> Array:
    """1 on the network's own target (DDPM's L_simple for eps)."""
    return jnp.ones_like(c_out)


def snr(level: NoiseLevel, c_out: Array) -> Array:
    """SNR on x_0, which is 1 on eps."""
    return level.snr * c_out**2


def truncated_snr(level: NoiseLevel, c_out: Array, minimum: float = 1.0) -> Array:
    """max(SNR, minimum) on x_0 (Salimans & Ho, 2022)."""
    return jnp.maximum(level.snr, minimum) * c_out**2


def min_snr(level: NoiseLevel, c_out: Array, gamma: float = 5.0) -> Array:
    """min(SNR, gamma) on x_0 (Hang et al., 2023)."""
    return jnp.minimum(level.snr, gamma) * c_out**2


def soft_min_snr(level: NoiseLevel, c_out: Array, gamma: float = 4.0) -> Array:
    """gamma SNR / (gamma + SNR) on x_0 (HDiT, Crowson et al., 2024, with gamma = sigma_data^-2)."""
    return gamma * level.snr / (gamma + level.snr) * c_out**2


def p2(level: NoiseLevel, c_out: Array, gamma: float = 1.0, k: float = 1.0) -> Array:
    """1 / (k + SNR)^gamma on eps (Choi et al., 2022)."""
    return level.snr / (k + level.snr) ** gamma * c_out**2


def sigmoid(level: NoiseLevel, c_out: Array, bias: float = 0.0) -> Array:
    """sigmoid(bias - log SNR) on eps (Kingma & Gao, 2023; Hoogeboom et al., 2024)."""
    return level.snr * jax.nn.sigmoid(bias - level.log_snr) * c_out**2


def edm(level: NoiseLevel, c_out: Array, sigma_data: float = 0.5) -> Array:
    """(s^2 + sigma_data^2) / (s sigma_data)^2 on x_0, s = sigma / alpha (Karras et al., 2022).

    With EDM's prediction that is 1 / alpha^2 on the network's target: 1 where alpha = 1.
    """
    ratio_terms = level.sigma**2 + (level.alpha * sigma_data) ** 2
    return ratio_terms / (level.sigma * sigma_data) ** 2 * c_out**2


def elbo(level: NoiseLevel, c_out: Array, *, schedule: Schedule) -> Array:
    """-1/2 dSNR/dt on x_0 (VDM, Kingma et al., 2021, eq. 17), times t_max.

    Under uniform times the expected squared error summed over elements is then the diffusion
    term of the variational bound, in nats.
    """
    _, slope = jax.jvp(lambda t: schedule(t).log_snr, (level.t,), (jnp.ones_like(level.t),))
    return -0.5 * schedule.t_max * slope * level.snr * c_out**2


CHOICES = {
    f.__name__: f
    for f in (simple, snr, truncated_snr, min_snr, soft_min_snr, p2, sigmoid, edm, elbo)
}
