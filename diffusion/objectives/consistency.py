"""Consistency models (Song et al., 2023): one evaluation goes from any noise level to the data.

    loss = E_n d(f_theta(x_{n+1}, t_{n+1}), f_target(y_n, t_n)),    y_n = solver(x_{n+1})

between neighbours of N + 1 nodes 0 = t_0 < ... < t_N = t_max. The solver makes one step of the
probability-flow ODE from t_{n+1} to t_n: with a teacher's E[x_0 | x] in consistency distillation
(algorithm 2), with the example x_0 itself in its place in consistency training (algorithm 3), where
Euler's step gives alpha_n x_0 + sigma_n eps. The target is an average of the student, through which
no gradient flows. Every prediction whose c_skip is 1 and c_out is 0 without noise (v, flow, edm,
eps) fulfils f(x, 0) = x, so that f is a ``Denoise`` and any sampler of those runs on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.denoiser import ConditionalDenoise, Denoise
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives import times
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.objective import Batch, Context, Measured, Params

OdeStep = Callable[[Denoise, Array, NoiseLevel, NoiseLevel], Array]
"""(denoise, x [B, ...], now, after) -> x at the levels ``after``; leaves of both [B]."""


def euler(denoise: Denoise, x: Array, now: NoiseLevel, after: NoiseLevel) -> Array:
    """alpha' D + sigma' (x - alpha D) / sigma, Euler's step and DDIM's, of order 1."""
    d = denoise(x, now)
    now, after = now.expand(x.ndim), after.expand(x.ndim)
    return after.alpha * d + after.sigma * (x - now.alpha * d) / now.sigma


def heun(denoise: Denoise, x: Array, now: NoiseLevel, after: NoiseLevel) -> Array:
    """Heun's step for z = x / (alpha + sigma) over sigma / (alpha + sigma), dz = eps - D, order 2.

    A step to the clean data is Euler's, as in EDM.
    """
    first = euler(denoise, x, now, after)
    safe = NoiseLevel(*(jnp.where(after.sigma == 0, a, b) for a, b in zip(now, after)))

    def slope(x: Array, level: NoiseLevel) -> Array:
        d, level = denoise(x, level), level.expand(x.ndim)
        return (x - (level.alpha + level.sigma) * d) / level.sigma

    mean = (slope(x, now) + slope(first, safe)) / 2
    now, after = now.expand(x.ndim), after.expand(x.ndim)
    total, total_after = now.alpha + now.sigma, after.alpha + after.sigma
    z = x / total + (after.sigma / total_after - now.sigma / total) * mean
    return jnp.where(after.sigma == 0, first, total_after * z)


@dataclasses.dataclass(frozen=True)
class Consistency(Denoising):
    """Trains ``network`` as a consistency function; ``weighting`` and ``terms`` have no part in it.

    Attributes:
      teacher: parameters -> its denoiser, for levels of ``schedule``; its parameters are
        ``frozen["teacher"]``. None for consistency training.
      nodes: N. Node n lies at the quantile n / N of ``times``, the first at 0, the last at t_max.
      target: the average's name in ``context.ema``, or "params" for the student itself.
    """

    teacher: Callable[[Params], ConditionalDenoise] | None = None
    nodes: int = 18
    solver: OdeStep = heun
    target: str = "ema"

    def loss(self, params: Params, context: Context, batch: Batch, key: Array) -> Measured:
        """The mean loss over a batch, and the loss by quartile of the noise level."""
        x0 = batch["x"]
        index = batch.get("index", jnp.arange(len(x0)))
        key_times, key_noise, key_drop, key_network = jax.random.split(key, 4)
        u = times.uniforms(key_times, index, self.stratify)
        after, now = self._neighbours(u)
        x = diffuse(x0, self.noise.draw(key_noise, index, x0), now)
        cond = self.conditioning(batch, index, key_drop)
        rngs = {"dropout": jax.random.fold_in(key_network, index[0])}

        def consistency(params: Params, x: Array, level: NoiseLevel) -> Array:
            return self.denoiser(params, train=context.train, rngs=rngs)(x, level, cond)

        if self.teacher is None:
            y = self.solver(lambda x, level: x0, x, now, after)
        else:
            teacher = self.teacher(context.frozen["teacher"])
            y = self.solver(lambda x, level: teacher(x, level, cond), x, now, after)
        averaged = (context.ema or {}).get(self.target, params)
        clean = after.t == 0  # where f(y) = y; networks are not evaluated without noise
        safe = NoiseLevel(*(jnp.where(clean, a, b) for a, b in zip(now, after)))
        target = consistency(averaged, y, safe)
        target = jnp.where(clean.reshape((-1,) + (1,) * (x.ndim - 1)), y, target)
        loss = self.distance(consistency(params, x, now), jax.lax.stop_gradient(target))
        return loss.mean(), times.by_quartile(loss, u, times.uniform, self.schedule)

    def levels(self, key: Array, index: Array) -> NoiseLevel:
        """The noise levels [B] that the student sees in ``loss`` with this key."""
        u = times.uniforms(jax.random.split(key, 4)[0], index, self.stratify)
        return self._neighbours(u)[1]

    def _neighbours(self, u: Array) -> tuple[NoiseLevel, NoiseLevel]:
        """Nodes n and n + 1, n uniform in 0..N-1 as u is in (0, 1)."""
        inner = jnp.sort(self.times(jnp.arange(1, self.nodes) / self.nodes, self.schedule))
        t = jnp.concatenate([jnp.zeros(1), inner, jnp.full(1, float(self.schedule.t_max))])
        n = jnp.floor(u * self.nodes).astype(jnp.int32)
        return self.schedule(t[n]), self.schedule(t[n + 1])


SOLVERS = {"euler": euler, "heun": heun}
