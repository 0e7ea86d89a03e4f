"""The loss on data that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.data import pipeline
from diffusion.data.sources import Source
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
    frozen: Any = None,
    average: str = "ema",
) -> Callable[[TrainState, int], dict[str, float]]:
    """A function (state, step) -> {"validation_loss": ..., "validation_loss_params": ...}.

    The first is of the average, the second of the parameters themselves. Examples, times and noise
    are the same each time, so that what changes is the model. The state may lie over the devices
    in any way: the batches are cut over those that it lies on.

    Args:
      objective: with ``loss``.
      source: held-out data; at most all of it is used, or a batch's rest more.
      count: examples, filled up to whole batches.
      batch_size: at most, over all devices.
      seed: for the choice of examples and the noise.
      frozen: parameters that the loss needs and that are not trained.
      average: the average's name.
    """
    count = min(count, len(source))
    key = jax.random.fold_in(jax.random.key(seed), KEY)
    placed: list[Any] = []

    @jax.jit
    def loss(params, frozen, batch, key):
        return objective.loss(params, frozen, batch, key, train=False)[0]

    def validate(state: TrainState, step: int) -> dict[str, float]:
        mesh = state.step.sharding.mesh
        share, batches = _batches(count, batch_size, mesh.size)
        batch_at = pipeline.batch_function(
            source,
            share,
            seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        over, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (mesh.axis_names, ()))
        if not placed:
            placed.append(jax.device_put((frozen, key), whole))
        trees = {"validation_loss": state.ema[average], "validation_loss_params": state.params}
        totals = dict.fromkeys(trees, 0.0)
        for i in range(batches):
            batch = {
                name: jax.make_array_from_process_local_data(over, value)
                for name, value in batch_at(i).items()
            }
            batch["step"] = jnp.int32(step)
            held, base = placed[0]
            for name, params in trees.items():
                totals[name] += float(loss(params, held, batch, jax.random.fold_in(base, i)))
        return {name: total / batches for name, total in totals.items()}

    return validate


def _batches(count: int, most: int, devices: int) -> tuple[int, int]:
    """Size and number of equal batches that hold ``count`` examples or a few more."""
    most = max(most // devices, 1) * devices
    batches = -(-count // most)
    return -(-count // (batches * devices)) * devices, batches
