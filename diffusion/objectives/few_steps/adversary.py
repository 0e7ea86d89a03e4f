"""Students that learn against a critic: adversarial diffusion distillation, of pixels or latents.

    L_critic = hinge(real x_0, samples x) + r1 |d logits / d features|^2
    L_student = -logits(x) + w c(t) |x - sg D_teacher(alpha x + sigma eps)|^2,    c(t) = alpha

The critic's heads are on features of a network that stays as it is: one that sees clean pictures
(ADD, Sauer et al., 2023), or the teacher itself, which sees noised ones (LADD, Sauer et al., 2024).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from diffusion import conditioning
from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives import times
from diffusion.objectives.few_steps.critics import (
    FEATURES,
    GAMES,
    Features,
    Heads,
    Logits,
    init_heads,
    slope_penalty,
    teacher,
)
from diffusion.objectives.few_steps.jumps import examples
from diffusion.objectives.few_steps.student import TEACHER, Drawn, Student
from diffusion.objectives.objective import Batch, Context, Measured, Params

HEAD = "head"
"""The name of the critic's parameters."""
USUAL = teacher()


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """A student that begins at one of a few levels, and a critic that learns at the same steps.

    Attributes:
      features: what the critic's heads are on, ``teacher(layers)``, ``classifier(RUN, layers)`` or
        ``dinov2(FOLDER, layers)``.
      steps: number of levels, evenly spaced, at which the student begins; the last is noise alone.
      probabilities: of the levels, from the most noise on; none: all are as likely.
      first: those of the first ``switch`` steps of training.
      noised: whether features are of noised samples, which suits the teacher's, with
        logit(sigma / (alpha + sigma)) ~ N(mean, std^2).
      distillation: w, the weight of the teacher's estimate of the student's noised sample.
      r1: weight of the penalty on the slope of the heads; gamma in the paper.
    """

    features: Features = USUAL
    steps: int = 4
    probabilities: tuple[float, ...] = ()
    first: tuple[float, ...] = ()
    switch: int = 0
    noised: bool = False
    mean: float = 1.0
    std: float = 1.0
    distillation: float = 2.5
    r1: float = 1e-5
    two_times: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 1000)
        check_range("switch", self.switch, 0)
        check_range("mean", self.mean, -30, 30)
        check_range("std", self.std, 0, 30)
        check_range("distillation", self.distillation, 0)
        check_range("r1", self.r1, 0)
        for name in ("probabilities", "first"):
            given = getattr(self, name)
            if given and (len(given) != self.steps or min(given) < 0 or not sum(given) > 0):
                raise ValueError(
                    f"{name}={given}: expected {self.steps} numbers of at least 0, not all 0"
                )
        if bool(self.first) != bool(self.switch):
            raise ValueError(
                f"first={self.first} are the probabilities of the first switch={self.switch} "
                "steps: expected both, or neither"
            )

    @property
    def teacher(self) -> str:
        return "needed" if self.distillation or self.features.kind == "teacher" else "possible"

    def init(self, student: Student, key: Array, batch: Batch, params: Params) -> Params:
        """The heads' parameters."""
        x, cond = jnp.asarray(batch["x"]), conditioning.from_batch(batch)
        level = student.schedule(jnp.full(len(x), 0.5 * student.schedule.t_max))

        def seen(frozen: Any) -> tuple:
            layers = student.extract(_of(frozen), x, level, cond)
            return layers, None if self.noised else _summary(layers)

        layers, given = jax.eval_shape(seen, student.frozen)
        return {HEAD: init_heads(jax.random.fold_in(key, 7), Heads(), layers, given)}

    def level(self, student: Student, u: Array) -> NoiseLevel:
        """Of the later steps of training."""
        return self._start(student, u, self.switch)[0]

    def _start(self, student: Student, u: Array, step: Array | int) -> tuple[NoiseLevel, Array]:
        """Where the student begins, and whether that is noise alone, [B]."""
        usual = jnp.asarray(self.probabilities or (1,) * self.steps, u.dtype)
        early = jnp.asarray(self.first, u.dtype) if self.first else usual
        chances = jnp.where(jnp.asarray(step) < self.switch, early, usual)
        bounds = jnp.cumsum(chances) / chances.sum()
        k = jnp.minimum((u[:, None] > bounds).sum(1), self.steps - 1)
        level = student.schedule((self.steps - k) / self.steps * student.schedule.t_max)
        # Where a little of the data would be left at the end, the student is not shown it.
        return level._replace(alpha=jnp.where(k == 0, 0, level.alpha)), k == 0

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean loss of both over a batch, and its parts."""
        drawn = student.draw(batch, key)
        start, blank = self._start(student, drawn.u, context.step)
        noise = diffuse(drawn.x0, drawn.noise, start)
        x = student.estimate(params, drawn, context)(noise, start)
        fixed = jax.lax.stop_gradient(x)
        real = self._seen(student, drawn, context, drawn.x0)
        given = None
        if not self.noised:
            given = jnp.where(blank[:, None], 0, _summary(real))

        def judge(layers: Any, head: Params) -> Logits:
            return Heads().apply({"params": head}, layers, given)

        head, game = params[HEAD], GAMES["hinge"]
        own = game.critic(
            judge(real, head), judge(self._seen(student, drawn, context, fixed), head)
        )
        metrics = {"critic": own}
        if self.r1:
            penalty = slope_penalty(lambda layers: judge(layers, head), real)
            own, metrics["slope"] = own + self.r1 * penalty, penalty
        unreal = game.student(
            judge(self._seen(student, drawn, context, x), jax.lax.stop_gradient(head))
        )
        metrics["adversary"] = unreal
        loss = own + unreal
        if self.distillation:
            apart = self._distilled(student, drawn, context, x)
            loss, metrics["distillation"] = loss + self.distillation * apart, apart
        return loss, metrics

    def _seen(self, student: Student, drawn: Drawn, context: Context, x: Array) -> tuple:
        """Features of x [B, ...], noised alike for real and generated ones, or hardly."""
        level = student.schedule(jnp.full(len(x), student.t_min))
        if self.noised:
            u, noise = student.again(drawn, 12, x)
            share = jax.nn.sigmoid(self.mean + self.std * ndtri(u))
            level = student.setting(context).at_fraction(share)
            x = diffuse(x, noise, level)
        return student.extract(_of(context.frozen), x, level, drawn.cond)

    def _distilled(self, student: Student, drawn: Drawn, context: Context, x: Array) -> Array:
        u, noise = student.again(drawn, 11, x)
        level = times.levels(u, student.times, student.schedule, student.t_min)
        x_t = diffuse(x, noise, level)
        goal = jax.lax.stop_gradient(student.taught(drawn, context)(x_t, level))
        return jnp.mean(examples(level.alpha, x.ndim) * (x - goal) ** 2)


def latent_adversarial(
    features: Features = USUAL,
    steps: int = 4,
    probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1),
    first: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5),
    switch: int = 500,
    mean: float = 1.0,
    std: float = 1.0,
    r1: float = 0.0,
) -> Adversarial:
    """LADD: heads on the teacher's blocks, at noised samples, and no distillation.

    Its authors train it on samples of the teacher.
    """
    return Adversarial(features, steps, probabilities, first, switch, True, mean, std, 0.0, r1)


def _of(frozen: Any) -> Any:
    """The parameters of the feature network, which may be the teacher."""
    return frozen.get(FEATURES, frozen.get(TEACHER))


def _summary(layers: Any) -> Array:
    """[B, C]: the mean token of the last layer."""
    last = layers[-1]
    return jax.lax.stop_gradient(last.reshape(len(last), -1, last.shape[-1]).mean(1))
