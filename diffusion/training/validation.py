"""The loss on data that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusion.data import batches as pipeline
from diffusion.data.sources import Source
from diffusion.objectives.objective import Context
from diffusion.training import parallel
from diffusion.training.state import TrainState

KEY = 7919
"""Folded into the run's seed, so that no noise of training is seen again."""


def make(
    objective: Any,
    source: Source,
    *,
    count: int,
    batch_size: int,
    seed: int,
    layout: parallel.Layout,
    frozen: Any = None,
    average: str = "ema",
) -> Callable[[TrainState, int], dict[str, float]]:
    """A function (state, step) -> {"validation_loss": ..., "validation_loss_params": ...}.

    The first is of the average, the second of the parameters themselves. Examples, times and noise
    are the same each time.

    Args:
      source: held-out data; at most all of it is used, or a batch's rest more.
      count: examples, filled up to whole batches.
      batch_size: at most, over all devices.
      seed: for the choice of examples and the noise.
      average: the average's name.
    """
    size, batches = _batches(min(count, len(source)), batch_size, layout.mesh.size)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batch_at = pipeline.batch_function(source, size, seed, **share)
    base = jax.random.fold_in(jax.random.key(seed), KEY)
    keys = [jax.random.fold_in(base, i) for i in range(batches)]
    placed: list[Any] = []  # frozen parameters and keys, once they are needed

    @jax.jit
    def loss(params, frozen, ema, step, batch, key):
        context = Context(frozen, ema, step, train=False)
        with layout.tracing(size):
            return objective.loss(params, context, batch, key)[0]

    def validate(state: TrainState, step: int) -> dict[str, float]:
        if not placed:
            placed[:] = parallel.place(layout, (frozen, keys))
        trees = {"validation_loss": state.ema[average], "validation_loss_params": state.params}
        totals = dict.fromkeys(trees, 0.0)
        for i, key in enumerate(placed[1]):
            batch = parallel.place_batch(layout, batch_at(i))
            for name, params in trees.items():
                value = loss(params, placed[0], state.ema, np.int32(step), batch, key)
                totals[name] += float(value)
        return {name: total / batches for name, total in totals.items()}

    return validate


def _batches(count: int, most: int, devices: int) -> tuple[int, int]:
    """Size and number of equal batches that hold ``count`` examples or a few more."""
    most = max(most // devices, 1) * devices
    batches = -(-count // most)
    return -(-count // (batches * devices)) * devices, batches
