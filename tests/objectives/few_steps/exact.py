"""A Gaussian, x_0 ~ N(m, s^2), whose denoiser, flow and flow maps are known."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion import predictions, schedules
from diffusion.levels import NoiseLevel
from diffusion.objectives.few_steps.student import Student
from diffusion.objectives.objective import Context

MEAN, STD = 0.3, 0.7
FLOW = schedules.RectifiedFlow()
PARAMS = {"network": {"unused": jnp.zeros(1)}}


def spread(level):
    """The deviation of x_t."""
    return jnp.sqrt((level.alpha * STD) ** 2 + level.sigma**2)


def flow(x, now, to):
    """The probability flow from one level to another."""
    now, to = now.expand(x.ndim), to.expand(x.ndim)
    return to.alpha * MEAN + spread(to) / spread(now) * (x - now.alpha * MEAN)


def denoise(x, level):
    """E[x_0 | x]."""
    level = level.expand(x.ndim)
    gain = level.alpha * STD**2 / spread(level) ** 2
    return MEAN + gain * (x - level.alpha * MEAN)


class ExactFlowMap(nn.Module):
    """On the rectified flow, the mean velocity to where ``cond.span`` aims; without it, to the end.

    ``network_time`` says what the network is given of the level: here t itself.
    """

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        to = jnp.zeros_like(time) if cond.span is None else time - cond.span
        near = jnp.abs(time - to) < 1e-12
        apart = jnp.where(near, 1.0, time - to)[:, None]
        now = FLOW(time)
        mean = (x - flow(x, now, FLOW(jnp.where(near, 0.0, to)))) / apart
        velocity = (x - denoise(x, now)) / time[:, None]
        return jnp.where(near[:, None], velocity, mean)


def student(method, network=None, **options):
    """Of a method, on the rectified flow; its network is the exact flow map."""
    options = {"stratify": 512, "std": STD} | options
    own = ExactFlowMap() if network is None else network
    return Student(own, FLOW, predictions.flow, lambda level: level.t, method=method, **options)


def taught(method, **options):
    """The same, with the exact denoiser as its teacher."""
    return student(
        method, teacher=lambda params: lambda x, level, cond: denoise(x, level), **options
    )


def exact_loss(objective, params=PARAMS, step=0, count=512):
    """Loss and metrics in float64; the noise is the same for every objective."""
    with jax.enable_x64(True):
        x = MEAN + STD * np.random.default_rng(0).normal(size=(count, 2))
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        context = Context({"teacher": None}, {"ema": params}, step)
        run = jax.jit(lambda x: objective.loss(params, context, {"x": x}, jax.random.key(3)))
        loss, metrics = run(x)
        return float(loss), jax.tree.map(np.asarray, metrics)


def levels(t):
    """Of the rectified flow, in NumPy."""
    return NoiseLevel(*map(np.asarray, FLOW(np.asarray(t, np.float64))))


exact_step = partial(lambda denoise, x, now, after: flow(x, now, after))
