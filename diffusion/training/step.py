"""One training step, the same on every device.

How it lies over the devices is ``parallel``'s: what is here is one function for every layout. The
state is donated: the new one takes the old one's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from diffusion import ema as ema_lib
from diffusion.levels import Array
from diffusion.training import parallel as parallel_lib
from diffusion.training.optimizers import Optimizer
from diffusion.training.packed_metrics import Packed
from diffusion.training.state import TrainState

Step = Callable[[TrainState, Any, Mapping[str, Array], Array], tuple[TrainState, Packed]]


def widened(batch: Mapping[str, Array]) -> dict[str, Array]:
    """What came as bfloat16, to be quick on its way, as float32: all is computed in that."""
    return {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in batch.items()}


def make_train_step(
    objective: Any,
    optimizer: Optimizer,
    emas: Mapping[str, ema_lib.Profile],
    *,
    accumulate: int = 1,
    devices: Sequence[jax.Device] | None = None,
    parallel: str = "pmap",
) -> Step:
    """A function (state, frozen, batch, key) -> (state, metrics), over all the devices.

    Args:
      objective: with ``loss(params, frozen, batch, key, train=True) -> (loss, metrics)``. The loss
        is a mean over the batch it is given, which may be a piece of the whole; ``batch['index']``
        says which. ``batch['step']``, the number of steps done before, and ``key`` are the same for
        all pieces.
      optimizer: from ``optimizers.make``.
      emas: averages' profiles by name, as in ``state.create``.
      accumulate: into how many pieces, gone through one after another, each device cuts its share
        of the batch. Saves memory; the update is the same.
      devices: default all, of all processes.
      parallel: the layout, "pmap" or "fsdp" (see ``parallel``).

    The returned function takes batch leaves [B, ...] and the *run's* key, from which each step
    derives its own, fold_in(key, step). Its metrics are packed scalars: the objective's,
    ``loss``, ``gradient_norm`` (before clipping), ``parameter_norm``, ``learning_rate`` and
    ``finite``: 0 where loss or gradients were not finite. Then parameters, optimiser and averages
    stay as they were; the step still counts, since it has used its data and its key.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")

    layout = parallel_lib.make(parallel, devices)

    def gradients(params, frozen, batch, key, step):
        def loss_fn(params, batch):
            size = len(next(iter(batch.values())))
            batch = {**widened(batch), "step": step}
            with layout.tracing(size):
                loss, metrics = objective.loss(params, frozen, batch, key, train=True)
            return loss, {**metrics, "loss": loss}

        def gradient(params, batch):
            grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
            return layout.keep(grads), metrics

        if accumulate == 1:
            return gradient(params, batch)
        pieces = layout.split(batch, accumulate)
        first = jax.tree.map(lambda x: x[0], pieces)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first)
        )

        def add(total, piece):
            return jax.tree.map(jnp.add, total, gradient(params, piece)), None

        total, _ = lax.scan(add, zeros, pieces)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, frozen: Any, batch: Mapping[str, Array], key: Array):
        key = jax.random.fold_in(key, state.step)
        grads, metrics = layout.mean(gradients(state.params, frozen, batch, key, state.step))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = {
            name: ema_lib.update(state.ema[name], params, profile(state.step + 1))
            for name, profile in emas.items()
        }
        metrics |= {
            "gradient_norm": norm,
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": optimizer.learning_rate(state.step),
            "finite": finite.astype(jnp.float32),
        }
        new = TrainState(state.step + 1, params, opt_state, averages)
        kept = state.replace(step=state.step + 1)
        return jax.tree.map(lambda n, k: jnp.where(finite, n, k), new, kept), Packed.of(metrics)

    return layout.compile(step)
