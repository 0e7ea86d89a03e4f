"""Drifting models (Deng et al., 2026): samples are drawn to the data and driven from each other.

    L = |x - sg(x + V(x))|^2

One evaluation makes a sample, in training as in sampling; there is neither noise level nor teacher.
Distances are of the examples as they are, which suits points: pictures need features.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.few_steps.matching import generate
from diffusion.objectives.few_steps.student import Student
from diffusion.objectives.objective import Batch, Context, Measured, Params


def drift(x: Array, towards: Array, away: Array, tau: float, own: bool = False) -> Array:
    """V [N, D] at x [N, D], between points [M, D] that attract and points [K, D] that repel.

        V = sum_ij k_i k_j (y_i - y_j),    i over those that attract, j over those that repel,

    with k = exp(-|x - y| / tau) over the root of its row's and its column's sum. It is 0 where both
    are the same points. ``own`` says that ``away`` are x themselves; then none repels itself.
    """
    both = jnp.concatenate([away, towards])
    square = jnp.sum((x[:, None] - both[None]) ** 2, axis=-1)
    k = jnp.exp(-jnp.sqrt(jnp.maximum(square, 1e-24)) / tau)
    if own:
        k = k.at[:, : len(away)].multiply(1 - jnp.eye(len(x), dtype=k.dtype))
    total = k.sum(1, keepdims=True) * k.sum(0, keepdims=True)
    k = k / jnp.sqrt(jnp.maximum(total, 1e-30))
    minus, plus = k[:, : len(away)], k[:, len(away) :]
    return plus @ towards * minus.sum(1, keepdims=True) - minus @ away * plus.sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Drifting:
    """The method; a device's share of the batch drifts by itself.

    Attributes:
      tau: the distance over which points act.
    """

    tau: float = 0.05
    two_times: ClassVar[bool] = False
    teacher: ClassVar[str] = "unused"

    def __post_init__(self) -> None:
        check_range("tau", self.tau, 0, above=True)

    def level(self, student: Student, u: Array) -> NoiseLevel:
        """The last: the student sees noise alone."""
        return student.schedule(jnp.full(u.shape, student.schedule.t_max))

    def loss(
        self, student: Student, params: Params, context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The mean square of the drift, whose gradient moves samples along it."""
        drawn = student.draw(batch, key)
        x = generate(student, params, drawn, context)
        rows, data = (a.reshape(len(a), -1) for a in (jax.lax.stop_gradient(x), drawn.x0))
        goal = x + drift(rows, data, rows, self.tau, own=True).reshape(x.shape)
        loss = jnp.mean((x - jax.lax.stop_gradient(goal)) ** 2)
        return loss, {"drift": jnp.sqrt(loss)}
