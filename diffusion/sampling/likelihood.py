"""Likelihoods by the probability-flow ODE (Song et al., 2021, section 4.3 and appendix D.2).

Divided by sqrt(alpha^2 + sigma^2), every schedule runs through the same points,

    z = cos(theta) x_0 + sin(theta) eps,      tan(theta) = sigma / alpha,

so that one ODE serves them all; only the network's time depends on the schedule. With
s = log tan(theta / 2), cos(theta) = -tanh s, and the ODE dz/dtheta = cos(theta) eps - sin(theta) D
becomes

    dz/ds = cos(theta) z - D(x_t),            x_t = sqrt(alpha^2 + sigma^2) z.

It has no division: it holds from little noise, where s is the logarithm of sigma / (2 alpha), to
no signal at all (s = 0), and is smooth at the steps of a table. Along it (Chen et al., 2018)

    log p(z_start) = log N(z_end; 0, I) + integral of div f ds,    f = cos(theta) z - D.

The prior, z_end ~ N(0, I), is the one that samplers start from.

The ODE starts at sigma_min > 0. The result is therefore the model's density of x_0 + sigma_min eps
at the data: a normalised density and, for smooth data, within O(sigma_min^2) of that of x_0. Data
with discrete values have no density: with sigma_min far below their spacing it is a comb. They are
dequantised instead,

    log P(x) >= E_q(u) [log p(x + u) - log q(u)],    u in x's bin, of width 2 / (levels - 1),

with u uniform, for networks trained on such data (Theis et al., 2016; in bits per dimension
-log2(p) / d + log2((levels - 1) / 2), 6.99 more at 256 levels), or with u a normal of deviation
sigma_min cut off at the bin's ends, for networks that were trained on the discrete values (Zheng
et al., 2023): x + u is then such a network's input at sigma_min. Both are lower bounds; the larger
one is the tighter. A network of discrete data that has not learned to remove noise between the
values loses log(width / sigma_min) with uniform u, for the place of a value in its bin; with
sigma_min near half the width the two bounds agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf, logsumexp
from jax.scipy.stats import norm

from diffusion.denoiser import ConditionalDenoise, Denoise, as_estimate
from diffusion.levels import Array, NoiseLevel
from diffusion.models.kernels.fused_attention import unfused
from diffusion.sampling import grids
from diffusion.schedules import Schedule

Field = Callable[[Array], Array]
Divergence = Callable[[Field, Array, jax.Array], tuple[Array, Array]]


class Likelihood(NamedTuple):
    """The log-likelihood [B] of each example in nats, and its cost.

    It is NaN where the ODE was not solved within ``max_steps``. ``evaluations`` [B] are those of
    the ODE's right side, the denoiser with its derivative.
    """

    log_p: Array
    evaluations: Array


def exact(f: Field, z: Array, key: jax.Array) -> tuple[Array, Array]:
    """f(z) and the trace of its Jacobian, from one derivative per entry of z."""
    value, derivative = jax.linearize(f, z)
    basis = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
    rows = jax.vmap(derivative)(basis).reshape(z.size, z.size)
    return value, jnp.trace(rows)


def hutchinson(
    f: Field, z: Array, key: jax.Array, probes: int = 1, draw: Callable = jax.random.rademacher
) -> tuple[Array, Array]:
    """f(z) and v . J v, whose mean over v with entries +-1 is J's trace (Hutchinson, 1990).

    The same key gives the same v, as one solution of the ODE needs.
    """
    v = draw(key, (probes, *z.shape), z.dtype)
    if probes == 1:
        value, derivative = jax.jvp(f, (z,), (v[0],))
        return value, jnp.vdot(v, derivative)
    value, derivative = jax.linearize(f, z)
    return value, jnp.vdot(v, jax.vmap(derivative)(v)) / probes


hutchinson_gaussian = partial(hutchinson, draw=jax.random.normal)
"""``hutchinson`` with standard normal v, whose variance is larger."""


def log_likelihood(
    denoise: Denoise | ConditionalDenoise,
    schedule: Schedule,
    x: Array,
    keys: jax.Array | None = None,
    *,
    cond: Any = None,
    divergence: Divergence = exact,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> Likelihood:
    """log p(x) of continuous data x [B, ...], in nats; traceable.

    Tsitouras' 5(4) pair chooses the steps of each image: an image's result and its number of
    evaluations do not depend on the batch, which runs until the last image is done.

    Args:
      denoise: (x [1, ...], level with leaves ()) -> x_0_hat or an ``Estimate``, not clipped. It is
        called for one image at a time (under ``vmap``); what differs between images is in ``cond``.
      schedule: the one that the denoiser was trained on.
      keys: [B] typed keys of the probes; ``exact`` needs none.
      cond: leaves [B, ...], such as a ``Conditioning``; then ``denoise(x, level, cond)``.
      divergence: ``exact``, for few dimensions, or an unbiased estimate.
      sigma_min: first sigma / alpha, by default ``grids.lowest_noise``.
      sigma_max: last sigma / alpha, by default the schedule's, which may be infinite.
      rtol, atol: tolerances of z and of the log-determinant per dimension, each.
      max_steps: most steps per image, accepted and rejected.
    """
    import diffrax  # takes half a second, so it is imported only where it is used

    if keys is None:
        keys = jax.random.split(jax.random.key(0), len(x))
    if keys.shape != (len(x),):
        raise ValueError(f"expected keys [{len(x)}], one per image, got shape {keys.shape}")
    sigma_min, sigma_max = noise_range(schedule, sigma_min, sigma_max)
    dtype = jnp.result_type(float)
    start, end = (-np.arcsinh(1 / np.float64(r)) for r in (sigma_min, sigma_max))
    cos = -np.tanh(start)
    denoise = unfused(denoise)  # the divergence differentiates forwards

    def one(x: Array, key: jax.Array, cond: Any) -> Likelihood:
        cond = jax.tree.map(lambda a: a[None], cond)

        def field(s: Array, z: Array) -> Array:
            level, scale = _level(schedule, s)
            x = (scale * z)[None]
            result = denoise(x, level, *([] if cond is None else [cond]))
            return -jnp.tanh(s) * z - as_estimate(result, x).x0[0].astype(dtype)

        def right_side(s: Array, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
            value, trace = divergence(lambda z: field(s, z), state[0], key)
            return value, trace / x.size

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(right_side),
            diffrax.Tsit5(),
            t0=jnp.asarray(start, dtype),
            t1=jnp.asarray(end, dtype),
            dt0=jnp.asarray((end - start) / 100, dtype),
            y0=(cos * x, jnp.zeros((), dtype)),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_norm),
            max_steps=max_steps,
            throw=False,
        )
        z, log_det = (a[0] for a in solution.ys)
        # p(y) dy = p(z) dz for y = z / cos(theta).
        log_p = norm.logpdf(z).sum() + x.size * (log_det + np.log(cos))
        solved = solution.result == diffrax.RESULTS.successful
        steps = solution.stats["num_steps"]  # 6 evaluations each; the 7th is the next one's first
        return Likelihood(jnp.where(solved, log_p, jnp.nan), 6 * steps + 1)

    return jax.vmap(one)(jnp.asarray(x, dtype), keys, cond)


def noise_range(
    schedule: Schedule, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """Both ends as sigma / alpha, with the defaults of ``log_likelihood`` in place of None."""
    with np.errstate(divide="ignore"):
        largest = float(schedule(schedule.t_max).ratio)
    low = grids.lowest_noise(schedule) if sigma_min is None else float(sigma_min)
    high = largest if sigma_max is None else float(sigma_max)
    if not 0 < low < high <= largest * (1 + 1e-6):
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max <= {largest:.6g}, got {low} and {high}"
        )
    return low, high


def _level(schedule: Schedule, s: Array) -> tuple[NoiseLevel, Array]:
    """The schedule's level at tan(theta / 2) = e^s, and sqrt(alpha^2 + sigma^2) there."""
    cos, sin = -jnp.tanh(s), 1 / jnp.cosh(s)
    t = jnp.minimum(schedule.invert(cos, sin), schedule.t_max)
    level = schedule(t)
    scale = jnp.hypot(level.alpha, level.sigma)
    return NoiseLevel(level.t, scale * cos, scale * sin), scale


def _norm(state: tuple[Array, Array]) -> Array:
    """The larger of the two errors; a mean over all entries would hide the log-determinant's."""
    z, log_det = state
    return jnp.maximum(jnp.sqrt(jnp.mean(z**2)), jnp.abs(log_det))


def uniform(
    key: jax.Array, shape: tuple[int, ...], width: float, sigma: float
) -> tuple[Array, Array]:
    """u of an image's shape, uniform in bins of this width, and log q(u)."""
    u = width * (jax.random.uniform(key, shape, jnp.result_type(float)) - 0.5)
    return u, jnp.asarray(-math.prod(shape) * math.log(width), u.dtype)


def truncated_normal(
    key: jax.Array, shape: tuple[int, ...], width: float, sigma: float
) -> tuple[Array, Array]:
    """u of deviation sigma, cut off at the bin's ends, and log q(u) (Zheng et al., 2023)."""
    end = width / (2 * sigma)
    u = jax.random.truncated_normal(key, -end, end, shape, jnp.result_type(float))
    log_q = norm.logpdf(u) - jnp.log(sigma * erf(end / math.sqrt(2)))
    return sigma * u, log_q.sum()


def discrete_log_likelihood(
    log_p: Callable[[Array, jax.Array], Likelihood],
    x: Array,
    keys: jax.Array,
    levels: int,
    *,
    sigma: float,
    dequantization: Callable[..., tuple[Array, Array]] = uniform,
    samples: int = 1,
) -> Likelihood:
    """A lower bound on log P(x), in nats, of values on ``levels`` even steps in [-1, 1].

    log P(x) >= E log (1/K) sum_k p(x + u_k) / q(u_k); more samples K make it tighter (Burda et al.,
    2016).

    Args:
      log_p: (x [B, ...], typed keys [B]) -> the ``Likelihood`` of continuous data.
      x: [B, ...] on the steps k 2 / (levels - 1) - 1, k = 0..levels - 1.
      levels: 256 for 8-bit images.
      sigma: deviation of ``truncated_normal``: the sigma_min of ``log_p``.
      dequantization: ``uniform`` or ``truncated_normal``.
      samples: K.
    """
    if levels < 2 or samples < 1 or not sigma > 0:
        raise ValueError(
            f"expected levels >= 2, samples >= 1 and sigma > 0, got {levels}, {samples}, {sigma}"
        )
    width = 2 / (levels - 1)

    def draw(k: Array) -> Likelihood:
        both = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, k)))(keys)
        u, log_q = jax.vmap(lambda key: dequantization(key, x.shape[1:], width, sigma))(both[:, 0])
        result = log_p(x + u, both[:, 1])
        return result._replace(log_p=result.log_p - log_q)

    drawn = jax.lax.map(draw, jnp.arange(samples))
    log_mean = logsumexp(drawn.log_p, axis=0) - math.log(samples)
    return Likelihood(log_mean, drawn.evaluations.sum(0))


def bits_per_dim(log_p: Array, shape: tuple[int, ...]) -> Array:
    """-log2(p) / d for log p in nats, of examples of this shape."""
    return -log_p / (math.prod(shape) * math.log(2))
