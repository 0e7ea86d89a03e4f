"""Students that learn from the derivative of their own output along the flow.

With x moving along the probability flow, the end of its trajectory and the mean velocity up to a
fixed level obey differential equations, which a network fulfils where its total derivative along
the flow is known. That derivative is one forward-mode product (JVP), through which no gradient
flows. Both methods here work on any schedule and prediction, since they see the network's estimate
of x_0 in coordinates of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.models.kernels.fused_attention import unfused
from diffusion.objectives import times
from diffusion.objectives.few_steps.jumps import examples
from diffusion.objectives.few_steps.student import Drawn, Student, fraction
from diffusion.objectives.objective import Batch, Context, Measured, Params

Field = Callable[[Array, Array], Array]
"""(x [B, ...], time [B]) -> [B, ...]."""


def along(field: Field, x: Array, time: Array, velocity: Array, rate: Array) -> Array:
    """d field / d s where dx / ds = velocity [B, ...] and d time / ds = rate [B]."""
    return jax.jvp(unfused(field), (x, time), (velocity, rate))[1]


def squared_norm(x: Array) -> Array:
    """[B, ...] -> [B], the sum of squares."""
    return jnp.sum(x.reshape(len(x), -1) ** 2, axis=1)


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """MeanFlow (Geng et al., 2025): the mean velocity between two times, from which one step goes.

        u(z, t, r) = v - (t - r) du/dt,     L = |u - sg(.)|^2 / sg(|u - sg(.)|^2 + c)^power

    with z = x / (alpha + sigma), t = sigma / (alpha + sigma) and du/dt along the flow, dz/dt = v.
    v is the teacher's velocity (distillation), or eps - x_0.

    Attributes:
      apart: share of examples with r < t, two independent draws of config.objective.times; in the
        others r = t, which is flow matching.
      power, c: of the adaptive weight; |.|^2 is a sum over the example.
      improved: the tangent is the network's own velocity u(z, t, t), so that the target depends on
        z alone (Geng et al., 2025, improved MeanFlow); without a teacher.
      scale, mix: omega and kappa of guidance that is trained in, with v replaced by omega v +
        (1 - omega - mix) u(z, t, t | no label) + mix u(z, t, t); 1 and 0 are none. The effective
        scale is omega / (1 - mix).
    """

    apart: float = 0.25
    power: float = 1.0
    c: float = 0.01
    improved: bool = False
    scale: float = 1.0
    mix: float = 0.0
    two_times: ClassVar[bool] = True
    teacher: ClassVar[str] = "possible"

    def __post_init__(self) -> None:
        check_range("apart", self.apart, 0, 1)
        check_range("power", self.power, 0, 2)
        check_range("c", self.c, 0, above=True)
        check_range("scale", self.scale, 0)
        check_range("mix", self.mix, 0, 0.999)

    def level(self, student: Student, u: Array) -> NoiseLevel:
        return student.level(u)

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss over a batch, and the squared error of the velocity."""
        drawn = student.draw(batch, key)
        other = times.independent_uniforms(jax.random.fold_in(drawn.key, 2), drawn.index)
        chosen = times.independent_uniforms(jax.random.fold_in(drawn.key, 3), drawn.index)
        t, s = (fraction(self.level(student, u)) for u in (drawn.u, other))
        s = jnp.where(chosen < self.apart, s, t)
        t, r = jnp.maximum(t, s), jnp.minimum(t, s)
        setting = student.setting(context)
        now = setting.at_fraction(t)
        z = student.noised(drawn, now) / examples(now.alpha + now.sigma, drawn.x0.ndim)

        def mean(params: Params, r: Array | None, drawn: Drawn = drawn) -> Field:
            """(z, t) -> u(z, t, r); without r, the velocity u(z, t, t)."""

            def field(z: Array, t: Array) -> Array:
                level = setting.at_fraction(t)
                to = level if r is None else setting.at_fraction(r)
                x = z * examples(level.alpha + level.sigma, z.ndim)
                d = student.estimate(params, drawn, context, to)(x, level)
                return (z - d) / examples(t, z.ndim)

            return field

        fixed = jax.lax.stop_gradient(params)
        if student.teacher is not None:
            x = z * examples(now.alpha + now.sigma, z.ndim)
            v = (z - student.taught(drawn, context)(x, now)) / examples(t, z.ndim)
        else:
            v = self._velocity(student, drawn, lambda given: mean(fixed, None, given)(z, t))
        tangent = v
        if self.improved and student.teacher is None:
            tangent = mean(fixed, None)(z, t)
        slope = along(mean(fixed, r), z, t, tangent, jnp.ones_like(t))
        goal = jax.lax.stop_gradient(v - examples(t - r, z.ndim) * slope)
        error = squared_norm(mean(params, r)(z, t) - goal)
        loss = error / jax.lax.stop_gradient(error + self.c) ** self.power
        return loss.mean(), {"distance": error.mean() / z[0].size}

    def _velocity(self, student: Student, drawn: Drawn, own: Callable[[Drawn], Array]) -> Array:
        """eps - x_0, guided by what the network itself says with and without a label."""
        v = drawn.noise - drawn.x0
        if self.scale == 1 and self.mix == 0:
            return v
        null = drawn._replace(cond=student.null(drawn.cond))
        away = (1 - self.scale - self.mix) * own(null)
        return self.scale * v + away + (self.mix * own(drawn) if self.mix else 0)


@dataclasses.dataclass(frozen=True)
class Continuous:
    """Continuous-time consistency models (sCM, Lu & Song, 2025).

    On the trigonometric flow of data scaled to unit variance, x = cos(a) x_0 + sin(a) eps, with
    f(x, a) = cos(a) x - sin(a) F(x, a):

        g = -cos^2(a) (F - v) - w cos(a) sin(a) (x + dF/da),     L = |F - sg(F + g / (|g| + c))|^2

    with v the teacher's velocity cos(a) eps - sin(a) x_0 (distillation) or that of the example, |g|
    the root mean square, and w rising from 0 to 1 in the first ``warmup`` steps. Other schedules
    and predictions are seen through their estimate of x_0.

    Attributes:
      warmup: steps, 0 for none.
      c: keeps the normalised tangent finite.
    """

    warmup: int = 1000
    c: float = 0.1
    two_times: ClassVar[bool] = False
    teacher: ClassVar[str] = "possible"

    def __post_init__(self) -> None:
        check_range("warmup", self.warmup, 0)
        check_range("c", self.c, 0)

    def level(self, student: Student, u: Array) -> NoiseLevel:
        return student.level(u)

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss over a batch, and the root mean square of the tangent."""
        drawn = student.draw(batch, key)
        now, setting = self.level(student, drawn.u), student.setting(context)
        angle = jnp.arctan2(now.sigma, student.std * now.alpha)
        scaled = drawn.x0 / student.std
        x = diffuse(scaled, drawn.noise, NoiseLevel(angle, jnp.cos(angle), jnp.sin(angle)))

        def velocity(estimate: Callable[[Array, NoiseLevel], Array]) -> Field:
            """(x, angle) -> F, of an estimate of x_0 on the objective's schedule."""

            def field(x: Array, angle: Array) -> Array:
                level = setting.at(student.std * jnp.tan(angle))
                norm = jnp.sqrt((student.std * level.alpha) ** 2 + level.sigma**2)
                d = estimate(x * examples(norm, x.ndim), level) / student.std
                cos, sin = (examples(f(angle), x.ndim) for f in (jnp.cos, jnp.sin))
                return (cos * x - d) / sin

            return field

        fixed = velocity(student.estimate(jax.lax.stop_gradient(params), drawn, context))
        cos, sin = (examples(f(angle), x.ndim) for f in (jnp.cos, jnp.sin))
        if student.teacher is None:
            v = cos * drawn.noise - sin * scaled
        else:
            v = velocity(student.taught(drawn, context))(x, angle)
        own = fixed(x, angle)
        # The factor within the product keeps it finite where the network's slope is steep.
        rate = jnp.cos(angle) * jnp.sin(angle)
        slope = along(fixed, x, angle, cos * sin * v, rate)
        warm = jnp.minimum(1.0, (context.step + 1) / self.warmup) if self.warmup else 1.0
        g = -(cos**2) * (own - v) - warm * (cos * sin * x + slope)
        norm = jnp.sqrt(squared_norm(g) / x[0].size)
        g = g / examples(norm + self.c, x.ndim)
        goal = jax.lax.stop_gradient(own + g)
        mine = velocity(student.estimate(params, drawn, context))(x, angle)
        loss, metrics = student.measured(student.distance(mine, goal), drawn, student.times)
        return loss, metrics | {"tangent": norm.mean()}
