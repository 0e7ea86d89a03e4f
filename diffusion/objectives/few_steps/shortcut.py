"""Shortcut models (Frans et al., 2025): one network for 1, 2, 4, ... steps, without a teacher."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.few_steps.jumps import examples, jump, landing, where
from diffusion.objectives.few_steps.pairs import Setting
from diffusion.objectives.few_steps.regression import check_target
from diffusion.objectives.few_steps.student import Student, fraction
from diffusion.objectives.objective import Batch, Context, Measured, Params, Weighted


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """A share of the examples learns that a step of length 2^-k is two of half the length.

    The two are made by the target. The other examples learn the velocity, as flow matching does.
    Lengths, in sigma / (alpha + sigma), go from 1 to 2 / finest, and steps begin at their
    multiples; the halves of the shortest are taken by the velocity.

    Attributes:
      finest: a power of 2, of how many steps the velocity is as good as exact.
      share: of the examples.
      target: the average that makes the halves, or "params" for the student itself.
    """

    finest: int = 128
    share: float = 0.25
    target: str = "ema"
    two_times: ClassVar[bool] = True
    teacher: ClassVar[str] = "unused"

    def __post_init__(self) -> None:
        check_target(self.target)
        check_range("finest", self.finest, 2, 4096)
        check_range("share", self.share, 0, 1)
        if self.finest & (self.finest - 1):
            low = 1 << self.finest.bit_length() - 1
            raise ValueError(
                f"finest={self.finest} must be a power of 2; nearest: {low} or {2 * low}"
            )

    def level(self, student: Student, u: Array) -> NoiseLevel:
        return self._steps(student, u)[0]

    def _steps(
        self, student: Student, u: Array
    ) -> tuple[NoiseLevel, NoiseLevel, NoiseLevel, Array]:
        """(now, half-way, to, whether the halves are the shortest); for u >= share, now alone."""
        setting = Setting(student.schedule, student.times)
        t = student.times(
            jnp.clip((u - self.share) / max(1 - self.share, 1e-6), 0, 1), student.schedule
        )
        learned = student.schedule(jnp.clip(t, student.t_min, student.schedule.t_max))
        kinds = self.finest.bit_length() - 1
        place = jnp.clip(u / max(self.share, 1e-6), 0, 1 - 1e-6) * kinds
        k = jnp.floor(place)
        count = 2.0**k
        start = jnp.floor((place - k) * count) + 1
        jumps = u < self.share
        now, half, to = (
            where(jumps, setting.at_fraction((start - part) / count), learned)
            for part in (0.0, 0.5, 1.0)
        )
        return now, half, to, k == kinds - 1

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss over a batch, and that of the steps and of the velocities."""
        drawn = student.draw(batch, key)
        now, half, to, shortest = self._steps(student, drawn.u)
        jumps = drawn.u < self.share
        x = student.noised(drawn, now)
        averaged = student.average(params, context, self.target)
        first = student.estimate(averaged, drawn, context, where(shortest, now, half))
        second = student.estimate(averaged, drawn, context, where(shortest, half, to))
        y = jump(x, first(x, now), now, half)
        y = jump(y, second(y, half), half, to)
        # Of those that learn the velocity, which do not move, the target is the example.
        moved = where(jumps, to, to._replace(sigma=jnp.zeros_like(to.sigma)))
        goal = jnp.where(examples(jumps, x.ndim), landing(x, y, now, moved), drawn.x0)
        goal = jax.lax.stop_gradient(goal)
        mine = student.estimate(params, drawn, context, to)(x, now)
        scale = examples(fraction(now), x.ndim)  # of errors in x_0 to those of the velocity
        distance = student.distance(mine / scale, goal / scale)
        parts = {"steps": jumps, "velocities": ~jumps}
        return distance.mean(), {
            name: Weighted(jnp.where(of, distance, 0).mean(), of.mean(dtype=distance.dtype))
            for name, of in parts.items()
        }
