"""The objective of networks that sample in few steps: what all methods share.

A method says how the student learns. What it builds on is here: noised examples, the student's
estimates, its averages, and a teacher, guided where wanted, as frozen parameters. A consistency
function f(x, level), the end of the trajectory through x, is a ``Denoise``. A two-time network
d(x, now, to) is told where it aims by ``cond.span``: ``jump`` with it is the flow map, at to = now
it is the denoiser, and at to = 0 the consistency function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion.conditioning import Conditioning, concatenate
from diffusion.denoiser import ConditionalDenoise, as_estimate
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives import times
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.few_steps.critics import Extract
from diffusion.objectives.few_steps.jumps import examples, where
from diffusion.objectives.few_steps.pairs import Setting
from diffusion.objectives.objective import Batch, Context, Measured, Params

TEACHER = "teacher"
"""The teacher's parameters in ``Context.frozen``."""

Estimate = Callable[[Array, NoiseLevel], Array]
"""(x [B, ...], level with leaves [B]) -> [B, ...]."""


class Drawn(NamedTuple):
    """A batch, and what was drawn for it.

    Attributes:
      x0, noise: [B, ...].
      cond: what the student is given, after dropout.
      u: [B] uniform numbers for levels.
      index: [B] places in the global batch.
      key: for whatever else a method draws.
      rngs: of the network.
    """

    x0: Array
    noise: Array
    cond: Conditioning
    u: Array
    index: Array
    key: Array
    rngs: dict[str, Array]


class Method(Protocol):
    """How a student learns.

    Three members may be absent. ``init(student, key, batch, params)`` gives parameters that are
    trained besides; ``step_on(loss)`` an objective's ``step`` on a loss; ``features`` says on which
    network's features critics judge.

    Attributes:
      two_times: whether the student is a two-time network.
      teacher: "needed", "possible" or "unused"; "pairs": its samples are the data.
    """

    two_times: bool
    teacher: str

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """As an objective's."""

    def level(self, student: Student, u: Array) -> NoiseLevel:
        """The levels [B] at which the student sees examples with these u [B]."""


@dataclasses.dataclass(frozen=True)
class Student(Denoising):
    """Trains ``network`` by a method; ``terms`` and ``coupling`` have no part in it.

    Attributes:
      method: how it learns.
      teacher: parameters -> its denoiser, for levels of ``schedule``; its parameters are
        ``frozen["teacher"]``. None where there is none.
      guidance: (low, high) of the scale of the teacher's classifier-free guidance, which is drawn
        uniformly for each example; (1, 1) is none.
      std: standard deviation of the data.
      embeds_guidance: whether the student is given that scale, as ``cond.guidance``.
      extract: features that critics judge.
      frozen: shapes of the frozen parameters, by name.
    """

    method: Method | None = None
    teacher: Callable[[Params], ConditionalDenoise] | None = None
    guidance: tuple[float, float] = (1.0, 1.0)
    embeds_guidance: bool = False
    std: float = 0.5
    extract: Extract | None = None
    frozen: Any = None

    @property
    def step(self) -> Callable | None:
        """The method's own, or None."""
        return self.step_on(self.loss)

    def step_on(self, loss: Callable) -> Callable | None:
        """The step on another loss, which is the method's in the end, such as an adapter's."""
        own = getattr(self.method, "step_on", None)
        return None if own is None else own(loss)

    def loss(self, params: Params, context: Context, batch: Batch, key: Array) -> Measured:
        """The method's."""
        return self.method.loss(self, params, context, batch, key)

    def levels(self, key: Array, index: Array) -> NoiseLevel:
        """The noise levels [B] that the student sees in ``loss`` with this key."""
        u = times.uniforms(jax.random.split(key, 5)[0], index, self.stratify)
        return self.method.level(self, u)

    def init(self, key: Array, batch: Batch) -> Params:
        """{"network": ...}, and what the method trains besides."""
        if self.embeds_guidance:
            batch = {**batch, "guidance": jnp.ones(len(batch["x"]))}
        params = super().init(key, batch)
        own = getattr(self.method, "init", None)
        return params if own is None else params | own(self, key, batch, params)

    def draw(self, batch: Batch, key: Array) -> Drawn:
        """Examples, noise (the batch's own, if it has "noise"), conditioning, uniform numbers."""
        x0 = batch["x"]
        index = batch.get("index", jnp.arange(len(x0)))
        key_times, key_noise, key_drop, key_network, own = jax.random.split(key, 5)
        cond = self.conditioning(batch, index, key_drop)
        if self.embeds_guidance:
            cond = cond.replace(guidance=self._scale(own, index))
        return Drawn(
            x0,
            batch["noise"] if "noise" in batch else self.noise.draw(key_noise, index, x0),
            cond,
            times.uniforms(key_times, index, self.stratify),
            index,
            own,
            {"dropout": jax.random.fold_in(key_network, index[0])},
        )

    def level(self, u: Array) -> NoiseLevel:
        """The levels [B] of the objective's times."""
        return times.levels(u, self.times, self.schedule, self.t_min)

    def again(self, drawn: Drawn, number: int, x: Array) -> tuple[Array, Array]:
        """Other uniform numbers [B] and noise like x [B, ...], for noising what is made of a batch;
        other ones for each number from 10 on."""
        key_times, key_noise = jax.random.split(jax.random.fold_in(drawn.key, number))
        u = times.uniforms(key_times, drawn.index, self.stratify)
        return u, self.noise.draw(key_noise, drawn.index, x)

    def setting(self, context: Context) -> Setting:
        """What pairs of levels are chosen for."""
        return Setting(self.schedule, self.times, context.step)

    def estimate(
        self, params: Params, drawn: Drawn, context: Context, to: NoiseLevel | None = None
    ) -> Estimate:
        """d(x, now, to) of these parameters; without ``to``, the denoiser's or consistency
        function's estimate of x_0.

        Where there is no noise it is x, as every prediction but x0 has it; the network is not
        evaluated there.
        """
        denoise = self.denoiser(params, train=context.train, rngs=drawn.rngs)
        cond, usual = drawn.cond, self.schedule(jnp.asarray(0.5 * self.schedule.t_max))

        def estimate(x: Array, now: NoiseLevel) -> Array:
            clean = now.sigma == 0
            safe = where(clean, usual, now)
            given = cond
            if to is not None and self.method.two_times:
                given = cond.replace(span=fraction(safe) - jnp.where(clean, 0, fraction(to)))
            d = as_estimate(denoise(x, safe, given)).x0
            return jnp.where(examples(clean, x.ndim), x, d)

        return estimate

    def average(self, params: Params, context: Context, name: str) -> Params:
        """The averaged parameters of that name, or "params": the student's own; no gradient flows
        through them."""
        return jax.lax.stop_gradient((context.ema or {}).get(name, params))

    def taught(self, drawn: Drawn, context: Context) -> Estimate:
        """The teacher's E[x_0 | x], guided."""
        frozen = context.frozen[TEACHER]
        if self.guidance == (1.0, 1.0):
            return self.like_teacher(frozen, drawn)
        denoise = self.teacher(frozen)
        cond = drawn.cond.replace(guidance=None)

        def guided(x: Array, level: NoiseLevel) -> Array:
            twice = NoiseLevel(*(jnp.concatenate([leaf, leaf]) for leaf in level))
            both = concatenate(cond, self.null(cond))
            d = as_estimate(denoise(jnp.concatenate([x, x]), twice, both)).x0
            towards, away = jnp.split(d, 2)
            scale = examples(self._scale(drawn.key, drawn.index), x.ndim)
            return away + scale * (towards - away)

        return guided

    def like_teacher(self, params: Params, drawn: Drawn) -> Estimate:
        """E[x_0 | x] of the teacher's network with these parameters, without guidance."""
        denoise, cond = self.teacher(params), drawn.cond.replace(guidance=None)
        return lambda x, level: as_estimate(denoise(x, level, cond)).x0

    def _scale(self, key: Array, index: Array) -> Array:
        """[B] of the teacher's guidance; the student's, where it is given one."""
        low, high = self.guidance
        return low + (high - low) * times.independent_uniforms(jax.random.fold_in(key, 1), index)

    def noised(self, drawn: Drawn, level: NoiseLevel) -> Array:
        """x_t [B, ...] of the batch."""
        return diffuse(drawn.x0, drawn.noise, level)

    def measured(self, loss: Array, drawn: Drawn, order: Callable = times.uniform) -> Measured:
        """The mean of a loss [B], and the loss by quartile of u, from the least noise on."""
        return loss.mean(), times.by_quartile(loss, drawn.u, order, self.schedule)


def fraction(level: NoiseLevel) -> Array:
    """sigma / (alpha + sigma), in [0, 1]: the time of the rectified flow, on any schedule."""
    return level.sigma / (level.alpha + level.sigma)
