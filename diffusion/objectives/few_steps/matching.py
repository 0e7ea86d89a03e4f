"""Generators whose samples, noised, are distributed as a teacher's.

    x = G(z),    x_t = alpha x + sigma eps,    D_real, D_fake = E[x_0 | x_t] of data and of samples

The gradient of KL(samples || data) of x_t, in x, is D_fake - D_real but for a factor. The teacher
is D_real. D_fake begins as the teacher and learns, by denoising, what the generator makes.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffusion import conditioning, predictions
from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives.few_steps import players
from diffusion.objectives.few_steps.critics import GAMES, Features, Heads, Logits, init_heads
from diffusion.objectives.few_steps.jumps import examples
from diffusion.objectives.few_steps.student import TEACHER, Drawn, Estimate, Student
from diffusion.objectives.objective import Batch, Context, Measured, Params, Weighted

FAKE, HEAD = "fake", "head"
"""Names of the critics' parameters: by how much the fake score's differ from the teacher's, and the
discriminator's."""


def generate(
    student: Student, params: Params, drawn: Drawn, context: Context, steps: int = 1
) -> Array:
    """Samples [B, ...] of the student, from noise alone.

    With several steps it begins with noise at the last of ``steps`` uniform nodes and draws, for
    all examples alike, the node at which it ends. Up to there it samples without gradient, as
    multistep consistency sampling does: so it learns from its own samples (backward simulation,
    Yin et al., 2024, DMD2).
    """
    unit = student.schedule.t_max / steps

    def at(node: Array | int) -> NoiseLevel:
        t = jnp.minimum(unit * node, student.schedule.t_max)
        return student.schedule(jnp.broadcast_to(t, drawn.index.shape))

    key, last = jax.random.fold_in(drawn.key, 20), steps
    x = examples(at(steps).sigma, drawn.x0.ndim) * drawn.noise
    if steps > 1:
        last = jax.random.randint(jax.random.fold_in(key, 0), (), 1, steps + 1)
        simulate = student.estimate(jax.lax.stop_gradient(params), drawn, context)

        def before(i: Array, x: Array) -> Array:
            node = steps - i
            noise = student.noise.draw(jax.random.fold_in(key, node), drawn.index, x)
            return diffuse(simulate(x, at(node)), noise, at(node - 1))

        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, steps - last, before, x))
    return student.estimate(params, drawn, context)(x, at(last))


class Made(NamedTuple):
    """Samples x [B, ...] of the student for a batch, and noise and levels to see them in."""

    drawn: Drawn
    context: Context
    x: Array
    noise: Array
    level: NoiseLevel


@dataclasses.dataclass(frozen=True)
class Matching(ABC):
    """What both methods share: a generator, and a fake score that follows it.

    Attributes:
      steps: in which the student samples.
      every: updates of the critics for one of the student.
      low, high: shares of t_max between which samples are noised.
    """

    steps: int = 1
    every: int = 5
    low: float = 0.02
    high: float = 0.98
    two_times: ClassVar[bool] = False
    teacher: ClassVar[str] = "needed"
    critics: ClassVar[tuple[str, ...]] = (FAKE, HEAD)

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 1000)
        check_range("every", self.every, 1, 10_000)
        check_range("low", self.low, 0, 1)
        check_range("high", self.high, self.low, 1)

    def step_on(self, loss: Any) -> Any:
        """See ``players.step_on``."""
        return players.step_on(loss, self.every, self.critics)

    def init(self, student: Student, key: Array, batch: Batch, params: Params) -> Params:
        """The fake score's difference from the teacher: none."""
        shapes = student.frozen[TEACHER]["network"]
        return {FAKE: jax.tree.map(lambda a: jnp.zeros(a.shape), shapes)}

    def level(self, student: Student, u: Array) -> NoiseLevel:
        """At which samples are noised."""
        t, end = student.times(u, student.schedule), student.schedule.t_max
        return student.schedule(jnp.clip(t, self.low * end, self.high * end))

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The critics' mean loss over a batch, and at every k-th step the student's."""
        drawn = student.draw(batch, key)
        level, (_, noise) = self.level(student, drawn.u), student.again(drawn, 10, drawn.x0)
        fixed = jax.lax.stop_gradient({k: v for k, v in params.items() if k in self.critics})

        def played(own: Params) -> tuple[Array, Array, Array]:
            x = generate(student, own, drawn, context, self.steps)
            loss, gap = self.matched(student, fixed, Made(drawn, context, x, noise, level))
            return loss, gap, jax.lax.stop_gradient(x)

        def watched(own: Params) -> tuple[Array, Array, Array]:
            x = generate(student, jax.lax.stop_gradient(own), drawn, context, self.steps)
            return jnp.zeros((), x.dtype), jnp.zeros((), x.dtype), x

        own = {k: v for k, v in params.items() if k not in self.critics}
        turn = players.learns(context, self.every)
        loss, gap, x = jax.lax.cond(turn, played, watched, own)
        turn = turn.astype(x.dtype)
        critic, metrics = self.criticised(student, params, drawn, context, x)
        metrics |= {"student": Weighted(loss, turn), "gap": Weighted(gap, turn)}
        return loss + critic, metrics

    @abstractmethod
    def matched(self, student: Student, critics: Params, made: Made) -> tuple[Array, Array]:
        """The student's loss of its samples, and how far the two estimates are apart."""

    def criticised(
        self, student: Student, params: Params, drawn: Drawn, context: Context, x: Array
    ) -> Measured:
        """The critics' loss of samples x: the denoising loss, of the network's own output."""
        u, noise = student.again(drawn, 11, x)
        level = self.level(student, u)
        d = self.fake(student, params, drawn, context)(diffuse(x, noise, level), level)
        # As an error of the network's output; a loss of x_0 would see strong noise alone.
        scale = predictions.precondition(student.prediction, level.expand(x.ndim)).c_out
        loss = jnp.mean(((d - x) / scale) ** 2)
        return loss, {FAKE: loss}

    def fake(self, student: Student, params: Params, drawn: Drawn, context: Context) -> Estimate:
        """D_fake, of the parameters {"fake": ...}."""
        return student.like_teacher(_fake(params, context), drawn)


def _fake(params: Params, context: Context) -> Params:
    teacher = context.frozen[TEACHER]
    return {**teacher, "network": jax.tree.map(jnp.add, teacher["network"], params[FAKE])}


def difference(
    x: Array, noise: Array, level: NoiseLevel, real: Estimate, fake: Estimate
) -> tuple[Array, Array]:
    """The loss whose gradient in the samples x is that of distribution matching, and mean |g|."""
    fixed = jax.lax.stop_gradient(x)
    x_t = diffuse(fixed, noise, level)
    d = real(x_t, level)
    gradient = jax.lax.stop_gradient((fake(x_t, level) - d) / _mean_abs(fixed - d))
    loss = 0.5 * jnp.mean((x - (fixed - gradient)) ** 2)
    return loss, jnp.mean(jnp.abs(gradient))


@dataclasses.dataclass(frozen=True)
class DistributionMatching(Matching):
    """DMD and DMD2 (Yin et al., 2024).

        L = |x - sg(x - g)|^2 / 2,    g = (D_fake - D_real) / mean|x - D_real|

    Attributes:
      adversary: weight of a discriminator in the student's loss, 3e-3 in the paper for ImageNet; 0:
        there is none. Its heads are on the fake score's features of noised samples and examples.
      critic: its weight in the critics' loss.
      layers: the fake score's blocks; none: the deepest of a U-Net, or the middle one.
    """

    adversary: float = 0.0
    critic: float = 0.01
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("adversary", self.adversary, 0)
        check_range("critic", self.critic, 0)
        if self.layers and not self.adversary:
            raise ValueError(f"layers={self.layers} are the discriminator's; set adversary > 0")

    @property
    def features(self) -> Features | None:
        """Of the network that heads are on; None without heads."""
        return Features("middle", layers=self.layers) if self.adversary else None

    def init(self, student: Student, key: Array, batch: Batch, params: Params) -> Params:
        """The fake score's difference from the teacher, none, and the heads."""
        made = super().init(student, key, batch, params)
        if not self.adversary:
            return made
        x, cond = jnp.asarray(batch["x"]), conditioning.from_batch(batch)
        level = student.schedule(jnp.full(len(x), 0.5 * student.schedule.t_max))
        layers = jax.eval_shape(student.extract, student.frozen[TEACHER], x, level, cond)
        return made | {HEAD: init_heads(jax.random.fold_in(key, 7), Heads(), layers)}

    def matched(self, student: Student, critics: Params, made: Made) -> tuple[Array, Array]:
        """See ``Matching.matched``."""
        drawn, context, x, noise, level = made
        fake, real = self.fake(student, critics, drawn, context), student.taught(drawn, context)
        loss, gap = difference(x, noise, level, real, fake)
        if self.adversary:
            logits = self._judge(student, critics, drawn, context, diffuse(x, noise, level), level)
            loss = loss + self.adversary * GAMES["softplus"].student(logits)
        return loss, gap

    def criticised(
        self, student: Student, params: Params, drawn: Drawn, context: Context, x: Array
    ) -> Measured:
        """The denoising loss, and the discriminator's."""
        loss, metrics = super().criticised(student, params, drawn, context, x)
        if not self.adversary:
            return loss, metrics
        u, noise = student.again(drawn, 12, x)
        level = self.level(student, u)
        real, fake = (
            self._judge(student, params, drawn, context, diffuse(each, noise, level), level)
            for each in (drawn.x0, x)
        )
        own = GAMES["softplus"].critic(real, fake)
        return loss + self.critic * own, metrics | {HEAD: own}

    def _judge(
        self,
        student: Student,
        params: Params,
        drawn: Drawn,
        context: Context,
        x: Array,
        level: NoiseLevel,
    ) -> Logits:
        layers = student.extract(_fake(params, context), x, level, drawn.cond)
        return Heads().apply({"params": params[HEAD]}, layers)


@dataclasses.dataclass(frozen=True)
class ScoreIdentity(Matching):
    """SiD (Zhou et al., 2024), differentiated through both estimates.

    L = (D_real - D_fake) . ((D_real - x) - alpha (D_real - D_fake)) / mean|x - D_real|
    """

    alpha: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0, 10)

    def matched(self, student: Student, critics: Params, made: Made) -> tuple[Array, Array]:
        """See ``Matching.matched``."""
        drawn, context, x, noise, level = made
        x_t = diffuse(x, noise, level)
        real = student.taught(drawn, context)(x_t, level)
        apart = real - self.fake(student, critics, drawn, context)(x_t, level)
        scale = jax.lax.stop_gradient(_mean_abs(x - real))
        loss = jnp.mean(apart * (real - x - self.alpha * apart) / scale)
        return loss, jnp.mean(jnp.abs(apart))


def _mean_abs(x: Array) -> Array:
    """[B, ...] -> [B, 1, ...], never 0."""
    mean = jnp.abs(x).mean(tuple(range(1, x.ndim)), keepdims=True)
    return jnp.maximum(mean, 1e-8)
