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

from diffusion import predictions
from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.predictions import Prediction
from diffusion.schedules import Schedule

Weighting = Callable[[NoiseLevel, Array], Array]

NEARLY_ZERO = 1e-18  # its square and its inverse's square are finite in float32
INFINITE = 1e30  # a weight of this size stands for an infinite limit


def weights(weighting: Weighting, prediction: Prediction, level: NoiseLevel) -> Array:
    """The factors of ||F - F*||^2 at levels with leaves [B], also at both ends of a schedule.

    At alpha = 0 or sigma = 0 they are the limits, which are huge where the limit is infinite.
    """
    inside = level._replace(
        alpha=jnp.maximum(level.alpha, NEARLY_ZERO), sigma=jnp.maximum(level.sigma, NEARLY_ZERO)
    )
    return weighting(inside, predictions.precondition(prediction, inside).c_out)


def simple(level: NoiseLevel, c_out: Array) -> Array:
    """1 on the network's own target (DDPM's L_simple for eps)."""
    return jnp.ones_like(c_out)


def snr(level: NoiseLevel, c_out: Array) -> Array:
    """SNR on x_0, which is 1 on eps."""
    return level.snr * c_out**2


def truncated_snr(level: NoiseLevel, c_out: Array, minimum: float = 1.0) -> Array:
    """max(SNR, minimum) on x_0, minimum >= 0 (Salimans & Ho, 2022)."""
    check_range("minimum", minimum, 0)
    return jnp.maximum(level.snr, minimum) * c_out**2


def min_snr(level: NoiseLevel, c_out: Array, gamma: float = 5.0) -> Array:
    """min(SNR, gamma) on x_0, gamma > 0 (Hang et al., 2023)."""
    check_range("gamma", gamma, 0, above=True)
    return jnp.minimum(level.snr, gamma) * c_out**2


def soft_min_snr(level: NoiseLevel, c_out: Array, gamma: float = 4.0) -> Array:
    """gamma SNR / (gamma + SNR) on x_0, gamma > 0 (HDiT, Crowson et al., 2024, with gamma =
    sigma_data^-2)."""
    check_range("gamma", gamma, 0, above=True)
    return level.snr * (gamma / (gamma + level.snr)) * c_out**2


def p2(level: NoiseLevel, c_out: Array, gamma: float = 1.0, k: float = 1.0) -> Array:
    """1 / (k + SNR)^gamma on eps, k > 0, gamma >= 0 (Choi et al., 2022)."""
    check_range("gamma", gamma, 0)
    check_range("k", k, 0, above=True)
    return level.snr / (k + level.snr) ** gamma * c_out**2


def sigmoid(level: NoiseLevel, c_out: Array, bias: float = 0.0) -> Array:
    """sigmoid(bias - log SNR) on eps (Kingma & Gao, 2023; Hoogeboom et al., 2024)."""
    check_range("bias", bias)
    return level.snr * jax.nn.sigmoid(bias - level.log_snr) * c_out**2


def edm(level: NoiseLevel, c_out: Array, sigma_data: float = 0.5) -> Array:
    """(s^2 + sigma_data^2) / (s sigma_data)^2 on x_0, s = sigma / alpha (Karras et al., 2022).

    With EDM's prediction that is 1 / alpha^2 on the network's target: 1 where alpha = 1.
    sigma_data > 0.
    """
    check_range("sigma_data", sigma_data, 0, above=True)
    ratio_terms = level.sigma**2 + (level.alpha * sigma_data) ** 2
    return ratio_terms / (level.sigma * sigma_data) ** 2 * c_out**2


def elbo(level: NoiseLevel, c_out: Array, *, schedule: Schedule) -> Array:
    """-1/2 dSNR/dt on x_0 (VDM, Kingma et al., 2021, eq. 17), times t_max.

    Under uniform times the expected squared error summed over elements is then the diffusion
    term of the variational bound, in nats.
    """
    t, (_, alpha, sigma) = schedule.argument(level), level
    _, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
    # -1/2 dSNR/dt = alpha (alpha sigma' - alpha' sigma) / sigma^3, which needs no logarithm.
    turn = (alpha * slope.sigma - slope.alpha * sigma) / sigma
    return schedule.t_max * alpha * turn * (c_out / sigma) ** 2


CHOICES = {
    f.__name__: f
    for f in (simple, snr, truncated_snr, min_snr, soft_min_snr, p2, sigmoid, edm, elbo)
}
