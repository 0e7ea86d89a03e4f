"""Metrics beside the loss that concern only some of the examples."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.objectives.times import TimeDistribution
from diffusion.schedules import Schedule


class Weighted(NamedTuple):
    """A weighted mean, as its two halves, of a piece of a batch.

    Both are averaged over devices, pieces and steps, and divided only then: a piece in which the
    weight is zero does no harm, and pieces count by the weight that they hold.

    Attributes:
      total: () mean over the piece of weight times value; [K] of K kinds of examples, which are
        logged with 1 to K after their name.
      weight: () or [K] mean over the piece of the weight.
    """

    total: Array
    weight: Array


def by_quartile(
    loss: Array, u: Array, times: TimeDistribution, schedule: Schedule
) -> dict[str, Weighted]:
    """{"loss_q": [4]}: the mean loss by quartile of the noise level, the first the cleanest.

    Times are quantiles of uniform numbers, so that each quartile holds a quarter of the examples.

    Args:
      loss: [B].
      u: [B] in (0, 1), what the times were made of.
      times: the time distribution, monotone in u.
      schedule: given to it.
    """
    low, high = times(jnp.array([0.25, 0.75], u.dtype), schedule)
    quartile = jnp.floor(4 * jnp.where(high > low, u, 1 - u))  # mode falls with u
    member = quartile == jnp.arange(4)[:, None]  # [4, B]
    # Where, not a product: a loss that is not finite must not enter the other quartiles.
    total = jnp.where(member, loss, 0).mean(-1)
    return {"loss_q": Weighted(total, member.mean(-1, dtype=loss.dtype))}
