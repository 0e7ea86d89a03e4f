"""Steps of two players: critics learn at each step, the student at every k-th.

One gradient serves both, since each player's loss holds the other's parameters fixed. At the other
steps the student is left as it is: its parameters, their averages and their part of the optimiser's
state, so that momentum does not move it. What the optimiser counts goes on with the steps, as its
schedule of learning rates needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.objectives.objective import Batch, Context, Tools


def learns(context: Context, every: int) -> Array:
    """Whether the student learns at this step, (); outside training its loss is always taken."""
    if not context.train or every == 1:
        return jnp.ones((), bool)
    return (jnp.asarray(context.step) + 1) % every == 0


def step_on(loss: Callable, every: int, critics: Collection[str]) -> Callable | None:
    """An objective's ``step`` on a loss; None, the default one, where all learn at each step.

    Args:
      loss: as an objective's.
      every: steps from one of the student's updates to the next.
      critics: names of the parameters that learn at each step; the others are the student's.
    """
    return None if every == 1 else partial(_step, loss, every, frozenset(critics))


def _step(
    loss: Callable,
    every: int,
    critics: Collection[str],
    tools: Tools,
    state: Any,
    frozen: Any,
    batch: Batch,
    key: Array,
) -> tuple[Any, Any]:
    context = tools.context(state, frozen)
    grads, metrics = tools.gradients(
        lambda params, piece: loss(params, context, piece, key), state.params, batch
    )
    new = tools.updated(state, grads)
    moves, names = learns(context, every), set(state.params)

    def chosen(path: tuple, new: Array, old: Array) -> Array:
        # The first name of a parameter in the path is the player's; others lie deeper in its tree.
        keys = (getattr(entry, "key", None) for entry in path)
        owner = next((key for key in keys if key in names), None)
        return new if owner is None or owner in critics else jnp.where(moves, new, old)

    kept = jax.tree_util.tree_map_with_path(chosen, new, state)
    return tools.finish(state, kept, grads, metrics)
