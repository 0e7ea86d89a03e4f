"""Students that agree with themselves or with a teacher on pairs of noise levels.

    loss = E w d( J(x, f(x); now -> end),  sg J(y, f'(y); to -> end) ),     y = step(x; now -> to)

With J the ``jump`` along a straight line. Consistency models, in all their forms, have their own
average or themselves as f'; in progressive distillation the target is where two of the teacher's
steps land.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion import specs
from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.few_steps.jumps import SOLVERS, examples, jump, landing
from diffusion.objectives.few_steps.pairs import Nodes, Pairs, Setting
from diffusion.objectives.few_steps.student import Student
from diffusion.objectives.objective import Batch, Context, Measured, Params

TARGETS = ("ema", "params")
USUAL = Nodes()


def check_target(name: str) -> None:
    """Raises ValueError for parameters that there are not."""
    if name not in TARGETS:
        raise specs.unknown("target", name, TARGETS)


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Consistency models (Song et al., 2023) and what grew out of them, by their pairs.

    The step from x to y is one of a teacher's probability-flow ODE (consistency distillation; with
    its guidance, latent consistency models, Luo et al., 2023). Without a teacher the example x_0
    itself stands for the estimate, and the step keeps the noise (consistency training).

    Attributes:
      pairs: ``nodes``, ``karras`` (improved consistency training), ``ect``, ``segments``
        (trajectory consistency) or ``trajectories`` (consistency trajectory models).
      solver: of the step, heun or euler.
      target: the average whose estimate is the goal, or "params" for the student itself.
    """

    pairs: Pairs = USUAL
    solver: str = "heun"
    target: str = "ema"
    teacher: ClassVar[str] = "possible"

    def __post_init__(self) -> None:
        check_target(self.target)
        if self.solver not in SOLVERS:
            raise specs.unknown("solver", self.solver, SOLVERS)

    @property
    def two_times(self) -> bool:
        return self.pairs.anywhere

    def level(self, student: Student, u: Array) -> NoiseLevel:
        return self.pairs(u, Setting(student.schedule, student.times)).now

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss over a batch, and the loss by quartile of the noise level."""
        drawn = student.draw(batch, key)
        now, to, end, weight = self.pairs(drawn.u, student.setting(context))
        x = student.noised(drawn, now)
        exact = student.teacher is None
        y = SOLVERS[self.solver](
            (lambda x, level: drawn.x0) if exact else student.taught(drawn, context), x, now, to
        )
        averaged = student.average(params, context, self.target)
        goal = student.estimate(averaged, drawn, context, end)(y, to)
        arrived = examples(to.sigma <= end.sigma, x.ndim)
        safe = to._replace(sigma=jnp.where(to.sigma == 0, 1, to.sigma))
        goal = jnp.where(arrived, y, jump(y, goal, safe, end))
        mine = student.estimate(params, drawn, context, end)(x, now)
        distance = student.distance(jump(x, mine, now, end), jax.lax.stop_gradient(goal))
        loss, metrics = student.measured(weight * distance, drawn)
        return loss, metrics | {"distance": distance.mean()}


@dataclasses.dataclass(frozen=True)
class Progressive:
    """Progressive distillation (Salimans & Ho, 2022, alg. 2): one step for two of the teacher's.

    The student samples in ``steps`` steps of DDIM, the teacher in twice as many; a run that halves
    them has the run before it as its teacher. The target is the x_0 whose one step lands where the
    two land, weighted by max(SNR, 1). The predictions v, x0 and flow are stable there, eps is not.
    """

    steps: int = 8
    two_times: ClassVar[bool] = False
    teacher: ClassVar[str] = "needed"

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 100_000)

    def level(self, student: Student, u: Array) -> NoiseLevel:
        return student.schedule(self._time(u, student)[0])

    def _time(self, u: Array, student: Student) -> tuple[Array, Array, Array]:
        """Uniform nodes, as the grid ``uniform`` has them: now, half-way and after."""
        n, unit = jnp.floor(u * self.steps) + 1, student.schedule.t_max / self.steps
        return n * unit, (n - 0.5) * unit, (n - 1) * unit

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss over a batch, and the loss by quartile of the noise level."""
        drawn = student.draw(batch, key)
        now, half, to = (student.schedule(t) for t in self._time(drawn.u, student))
        x, taught = student.noised(drawn, now), student.taught(drawn, context)
        y = jump(x, taught(x, now), now, half)
        y = jump(y, taught(y, half), half, to)
        goal = jax.lax.stop_gradient(landing(x, y, now, to))
        distance = student.distance(student.estimate(params, drawn, context)(x, now), goal)
        loss, metrics = student.measured(jnp.maximum(now.snr, 1) * distance, drawn)
        return loss, metrics | {"distance": distance.mean()}


@dataclasses.dataclass(frozen=True)
class GuidanceDistillation:
    """A student that is told the scale of guidance and needs one call (Meng et al., 2023, stage 1).

    It learns the teacher's guided estimate, for scales of config.few_steps.guidance, weighted by
    max(SNR, 1) on x_0.
    """

    two_times: ClassVar[bool] = False
    teacher: ClassVar[str] = "needed"

    def level(self, student: Student, u: Array) -> NoiseLevel:
        return student.level(u)

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss over a batch, and the loss by quartile of the noise level."""
        drawn = student.draw(batch, key)
        now = self.level(student, drawn.u)
        x = student.noised(drawn, now)
        goal = student.taught(drawn, context)(x, now)
        distance = student.distance(student.estimate(params, drawn, context)(x, now), goal)
        loss, metrics = student.measured(jnp.maximum(now.snr, 1) * distance, drawn, student.times)
        return loss, metrics | {"distance": distance.mean()}
