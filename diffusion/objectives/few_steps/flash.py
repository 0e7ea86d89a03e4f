"""Flash Diffusion (Chadebec et al., 2024): a student, often an adapter, in four stages.

    L = d(f(x_s, s), sg x_teacher) + w_k L_DMD + v_k L_GAN

x_teacher is where the teacher's guided solver arrives from the same x_s. The fake score of L_DMD is
the student itself; the critic's heads are on the frozen teacher's features, with squared errors.
From stage to stage the student begins more often at strong noise, and w and v grow.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion import conditioning
from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives.few_steps.critics import GAMES, Features, Heads, Logits, init_heads
from diffusion.objectives.few_steps.jumps import multistep
from diffusion.objectives.few_steps.matching import HEAD, difference
from diffusion.objectives.few_steps.student import TEACHER, Drawn, Student
from diffusion.objectives.objective import Batch, Context, Measured, Params

STARTS = ((0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2))
"""Of each stage, how likely the student begins around the solver's step 0, K/4, K/2 and 3K/4."""
VARIANCE = 0.5  # of the step around these
JUDGED = (0.01, 0.25, 0.5, 0.75)
"""Shares of t_max at which samples are judged."""


@dataclasses.dataclass(frozen=True)
class Flash:
    """The method; guidance is of config.few_steps.guidance, (3, 13) in the paper.

    Attributes:
      stage: steps of training of each of the first three stages; the fourth lasts.
      solver_steps: K, of the teacher's DPM-Solver++ (2M), a multiple of 4.
      matching, adversary: w and v of each stage; none: without.
      layers: the teacher's blocks that are judged; none: the deepest of a U-Net, or the middle one.
    """

    stage: int = 5000
    solver_steps: int = 32
    matching: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)
    adversary: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    layers: tuple[int, ...] = ()
    two_times: ClassVar[bool] = False
    teacher: ClassVar[str] = "needed"

    def __post_init__(self) -> None:
        check_range("stage", self.stage, 1)
        check_range("solver_steps", self.solver_steps, 4, 1000)
        if self.solver_steps % 4:
            low = self.solver_steps // 4 * 4
            raise ValueError(
                f"solver_steps={self.solver_steps} must be a multiple of 4; nearest: {low} or "
                f"{low + 4}"
            )
        for name in ("matching", "adversary"):
            weights = getattr(self, name)
            if weights and (len(weights) != 4 or min(weights) < 0):
                raise ValueError(f"{name}={weights}: expected a weight >= 0 of each of 4 stages")

    @property
    def features(self) -> Features | None:
        """Of the network that heads are on; None without heads."""
        return Features("middle", layers=self.layers) if self.adversary else None

    def init(self, student: Student, key: Array, batch: Batch, params: Params) -> Params:
        """The heads' parameters."""
        if not self.adversary:
            return {}
        x, cond = jnp.asarray(batch["x"]), conditioning.from_batch(batch)
        level = student.schedule(jnp.full(len(x), 0.5 * student.schedule.t_max))
        layers = jax.eval_shape(student.extract, student.frozen[TEACHER], x, level, cond)
        return {HEAD: init_heads(jax.random.fold_in(key, 7), Heads(), layers)}

    def level(self, student: Student, u: Array) -> NoiseLevel:
        """Of the last stage."""
        return student.schedule(self._nodes(student)[self._start(u, 3)])

    def _nodes(self, student: Student) -> Array:
        """[K + 1] times of the solver, from t_max to 0."""
        return jnp.linspace(student.schedule.t_max, 0, self.solver_steps + 1)

    def _start(self, u: Array, stage: Array | int) -> Array:
        """[B] the solver's step at which the student begins."""
        k = jnp.arange(self.solver_steps, dtype=u.dtype)
        around = jnp.arange(4, dtype=u.dtype) * self.solver_steps / 4
        near = jnp.exp(-((k - around[:, None]) ** 2) / (2 * VARIANCE))
        chances = jnp.asarray(STARTS, u.dtype)[stage] @ near
        bounds = jnp.cumsum(chances) / chances.sum()
        return jnp.minimum((u[:, None] > bounds).sum(1), self.solver_steps - 1)

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss of both players over a batch, and its parts."""
        drawn = student.draw(batch, key)
        stage = jnp.minimum(jnp.asarray(context.step) // self.stage, 3)
        first, nodes = self._start(drawn.u, stage), self._nodes(student)
        level = student.schedule(nodes[first])
        x_s = student.noised(drawn, level)
        nodes = student.schedule(jnp.broadcast_to(nodes[:, None], (len(nodes), len(first))))
        goal = multistep(student.taught(drawn, context), x_s, nodes, first)
        x = student.estimate(params, drawn, context)(x_s, level)
        distance = student.distance(x, jax.lax.stop_gradient(goal)).mean()
        loss, metrics = distance, {"distance": distance}
        for name, weights, part in (
            ("matching", self.matching, self._matched),
            ("adversary", self.adversary, self._judged),
        ):
            if not weights:
                continue
            weight = jnp.asarray(weights, x.dtype)[stage]
            args = params, drawn.x0, x

            def acts(params, x0, x, part=part):
                return part(student, params, drawn, context, x)

            added = jax.lax.cond(weight > 0, acts, lambda *_: jnp.zeros((), x.dtype), *args)
            loss, metrics[name] = loss + weight * added, added
        return loss, metrics

    def _matched(
        self, student: Student, params: Params, drawn: Drawn, context: Context, x: Array
    ) -> Array:
        """Distribution matching, with the student as the fake score."""
        u, noise = student.again(drawn, 11, x)
        level = student.schedule(jnp.clip(u, 0.02, 0.98) * student.schedule.t_max)
        fake = student.estimate(jax.lax.stop_gradient(params), drawn, context)
        return difference(x, noise, level, student.taught(drawn, context), fake)[0]

    def _judged(
        self, student: Student, params: Params, drawn: Drawn, context: Context, x: Array
    ) -> Array:
        """Both players' losses: each holds the other's parameters fixed."""
        u, noise = student.again(drawn, 12, x)
        t = jnp.asarray(JUDGED, u.dtype)[jnp.floor(4 * u).astype(jnp.int32)]
        level = student.schedule(t * student.schedule.t_max)

        def judge(x: Array, head: Params) -> Logits:
            x_t = diffuse(x, noise, level)
            layers = student.extract(context.frozen[TEACHER], x_t, level, drawn.cond)
            return Heads().apply({"params": head}, layers)

        head, game = params[HEAD], GAMES["squares"]
        unreal = game.student(judge(x, jax.lax.stop_gradient(head)))
        return unreal + game.critic(judge(drawn.x0, head), judge(jax.lax.stop_gradient(x), head))
