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
      total: () mean over the piece of weight times value.
      weight: () mean over the piece of the weight.
    """

    total: Array
    weight: Array


def by_quartile(
    loss: Array, u: Array, times: TimeDistribution, schedule: Schedule
) -> dict[str, Weighted]:
    """{"loss_q1": ..., "loss_q4": ...}: the mean loss by quartile of the noise level, q1 cleanest.

    Times are quantiles of uniform numbers, so that each quartile holds a quarter of the examples.

    Args:
      loss: [B].
      u: [B] in (0, 1), what the times were made of.
      times: the time distribution, monotone in u.
      schedule: given to it.
    """
    low, high = times(jnp.array([0.25, 0.75], u.dtype), schedule)
    quartile = jnp.floor(4 * jnp.where(high > low, u, 1 - u))  # mode falls with u
    members = {f"loss_q{k + 1}": (quartile == k).astype(loss.dtype) for k in range(4)}
    # Where, not a product: a loss that is not finite must not enter the other quartiles.
    return {
        name: Weighted(jnp.where(member > 0, loss, 0).mean(), member.mean())
        for name, member in members.items()
    }
