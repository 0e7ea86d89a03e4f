"""Time distributions: which noise levels training sees.

Each is a quantile function ``(u, schedule) -> t`` that turns uniform numbers into times. How the
uniform numbers are drawn, independently or stratified, is thereby a separate choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.objective import Weighted
from diffusion.schedules import Schedule

TimeDistribution = Callable[[Array, Schedule], Array]

_TINY = 2.0**-24  # half of jax.random.uniform's resolution in float32


def independent_uniforms(key: Array, index: Array) -> Array:
    """u [B] in (0, 1); example i's depends on ``key`` and ``index[i]`` alone."""
    return _inside(jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index))


def stratified_uniforms(key: Array, index: Array, strata: int) -> Array:
    """u_i = (u_0 + i / strata) mod 1 with one u_0 for all (VDM, Kingma et al., 2021, app. I.1).

    With ``strata`` the global batch size and ``index`` the place in the batch, each batch covers
    all times evenly, which lowers the variance of the loss; each u_i is still uniform.
    """
    return _inside((jax.random.uniform(key) + index / strata) % 1.0)


def uniforms(key: Array, index: Array, strata: int | None) -> Array:
    """u [B] in (0, 1), stratified over ``strata`` places or, if that is None, independent."""
    if strata is None:
        return independent_uniforms(key, index)
    return stratified_uniforms(key, index, strata)


def levels(u: Array, times: TimeDistribution, schedule: Schedule, t_min: float) -> NoiseLevel:
    """The noise levels at the times that u [B] gives, from t_min to t_max."""
    return schedule(jnp.clip(times(u, schedule), t_min, schedule.t_max))


def _inside(u: Array) -> Array:
    return jnp.clip(u, _TINY, 1 - _TINY)


def uniform(u: Array, schedule: Schedule) -> Array:
    """t uniform in (0, t_max)."""
    return u * schedule.t_max


def discrete(u: Array, schedule: Schedule, steps: int = 1000) -> Array:
    """t uniform in {1/T, ..., 1} t_max for T = steps >= 1: the table's own times (DDPM)."""
    check_range("steps", steps, 1, 2**23)  # uniform numbers of float32 are multiples of 2^-23
    return jnp.ceil(u * steps) / steps * schedule.t_max


def logit_normal(u: Array, schedule: Schedule, mean: float = 0.0, std: float = 1.0) -> Array:
    """logit(t / t_max) ~ N(mean, std^2), std > 0 (SD3, Esser et al., 2024, eq. 19)."""
    _check_normal(mean, std)
    return jax.nn.sigmoid(mean + std * ndtri(u)) * schedule.t_max


def mode(u: Array, schedule: Schedule, scale: float = 1.29) -> Array:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), heavy in the middle (SD3, eq. 20).

    Monotone, as it must be, for -1 <= scale <= 2 / (pi - 2) = 1.75.
    """
    check_range("scale", scale, -1, 2 / (math.pi - 2))
    return (1 - u - scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)) * schedule.t_max


def cosmap(u: Array, schedule: Schedule) -> Array:
    """t = 1 - 1 / (tan(pi u / 2) + 1): the cosine schedule's log SNRs on the flow (SD3, eq. 21)."""
    return (1 - 1 / (jnp.tan(jnp.pi / 2 * u) + 1)) * schedule.t_max


def log_normal(u: Array, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Array:
    """log(sigma / alpha) ~ N(mean, std^2), std > 0, cut at the schedule's end (EDM, Karras et al.,
    2022)."""
    _check_normal(mean, std)
    ratio = jnp.exp(jnp.clip(mean + std * ndtri(u), -40, 40))  # its square is in float32
    return jnp.minimum(schedule.invert(jnp.ones_like(ratio), ratio), schedule.t_max)


def _check_normal(mean: float, std: float) -> None:
    check_range("mean", mean, -30, 30)
    check_range("std", std, 0, 30, above=True)


def by_quartile(
    loss: Array, u: Array, times: TimeDistribution, schedule: Schedule
) -> dict[str, Weighted]:
    """{"loss_q": [4]}: the mean loss by quartile of the noise level, the first the cleanest.

    loss [B] is of the examples at times(u), u [B]; ``times`` is monotone in u, so that each
    quartile holds a quarter of the examples.
    """
    low, high = times(jnp.array([0.25, 0.75], u.dtype), schedule)
    quartile = jnp.floor(4 * jnp.where(high > low, u, 1 - u))  # mode falls with u
    member = quartile == jnp.arange(4)[:, None]  # [4, B]
    # Where, not a product: a loss that is not finite must not enter the other quartiles.
    total = jnp.where(member, loss, 0).mean(-1)
    return {"loss_q": Weighted(total, member.mean(-1, dtype=loss.dtype))}


CHOICES = {f.__name__: f for f in (uniform, discrete, logit_normal, mode, cosmap, log_normal)}
