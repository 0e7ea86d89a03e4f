"""Rectified flow's second stage (Liu et al., 2023): a flow along straight lines.

A teacher's samples and the noise that it made them from are pairs that its flow couples. Trained on
these pairs, a new flow has the same ends and straighter ways, since lines that cross are averaged.
Straight ways need one step.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.few_steps.jumps import examples
from diffusion.objectives.few_steps.student import Student, fraction
from diffusion.objectives.objective import Batch, Context, Measured, Params


@dataclasses.dataclass(frozen=True)
class Reflow:
    """Learns the velocity noise - sample of a teacher's pairs, at the times of the objective.

    With ``one_step`` it learns only the sample, at the noisiest level: one-step distillation of a
    flow that is straight already (InstaFlow, Liu et al., 2024).

    Attributes:
      count: pairs, drawn once and kept in the teacher's workdir.
      solver, steps: of the teacher.
    """

    count: int = 50_000
    solver: str = "heun"
    steps: int = 32
    one_step: bool = False
    two_times: ClassVar[bool] = False
    teacher: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        check_range("count", self.count, 1)
        check_range("steps", self.steps, 1, 100_000)

    def level(self, student: Student, u: Array) -> NoiseLevel:
        if self.one_step:
            return student.schedule(jnp.full(u.shape, float(student.schedule.t_max)))
        return student.level(u)

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss over a batch, and by quartile of the noise level."""
        drawn = student.draw(batch, key)
        now = self.level(student, drawn.u)
        mine = student.estimate(params, drawn, context)(student.noised(drawn, now), now)
        # Errors of x_0 over sigma / (alpha + sigma) are those of the velocity.
        scale = examples(fraction(now), mine.ndim)
        loss = student.distance(mine / scale, drawn.x0 / scale)
        return loss.mean(), {} if self.one_step else student.measured(loss, drawn)[1]
