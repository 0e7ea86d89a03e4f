"""One training step, the same on every device.

The batch is cut along its first axis, one piece per device; each device averages its gradients
over its piece, ``pmean`` averages them over the devices, and each makes the same update. The state
keeps its natural shape (no leading device axis), lies whole on every device and is donated: the
new one takes the old one's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.levels import Array
from diffusion.training import ema as ema_lib
from diffusion.training.optimizers import Optimizer
from diffusion.training.state import TrainState

AXIS = "data"

Step = Callable[[TrainState, Any, Mapping[str, Array], Array], tuple[TrainState, dict[str, Array]]]


def replicated(devices: Sequence[jax.Device] | None = None) -> NamedSharding:
    """The sharding of an array that lies whole on each of the devices (default: all local ones).

    State, frozen parameters and key should be put there once (``jax.device_put``): whatever else
    is passed to the step is copied to the devices anew at each call.
    """
    devices = jax.local_devices() if devices is None else devices
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())


def split(batch: Mapping[str, Array], pieces: int) -> dict[str, Array]:
    """Leaves [B, ...] -> [pieces, B / pieces, ...].

    Raises:
      ValueError: B is not a multiple of ``pieces``.
    """
    sizes = {name: len(leaf) for name, leaf in batch.items()}
    for name, size in sizes.items():
        if size % pieces:
            near = ", ".join(
                str(n) for n in (size // pieces * pieces, -(-size // pieces) * pieces) if n
            )
            raise ValueError(
                f"batch[{name!r}] has {size} examples, which {pieces} pieces (devices x"
                f" accumulation) do not divide; the nearest batch sizes that work: {near}"
            )
    return {name: x.reshape(pieces, len(x) // pieces, *x.shape[1:]) for name, x in batch.items()}


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
) -> Step:
    """A function (state, frozen, batch, key) -> (state, metrics), mapped over the devices.

    Args:
      objective: with ``loss(params, frozen, batch, key, train=True) -> (loss, metrics)``. The loss
        is a mean over the batch it is given, which here is a piece of the whole; ``batch['index']``
        says which. ``batch['step']``, the number of steps done before, and ``key`` are the same for
        all pieces.
      optimizer: from ``optimizers.make``.
      emas: averages' profiles by name, as in ``state.create``.
      accumulate: into how many pieces, gone through one after another, each device cuts its share
        of the batch. Saves memory; the update is the same.
      devices: default all local devices.

    The returned function takes batch leaves [B, ...] and the *run's* key, from which each step
    derives its own, fold_in(key, step). Its metrics are scalars on the device: the objective's,
    ``loss``, ``gradient_norm`` (before clipping), ``parameter_norm``, ``learning_rate`` and
    ``finite``: 0 where loss or gradients were not finite. Then parameters, optimiser and averages
    stay as they were; the step still counts, since it has used its data and its key.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")

    def gradients(params, frozen, batch, key, step):
        def loss_fn(params, batch):
            batch = {**widened(batch), "step": step}
            loss, metrics = objective.loss(params, frozen, batch, key, train=True)
            return loss, {**metrics, "loss": loss}

        gradient = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return gradient(params, batch)
        pieces = split(batch, accumulate)
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
        grads, metrics = lax.pmean(gradients(state.params, frozen, batch, key, state.step), AXIS)
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
        return jax.tree.map(lambda n, k: jnp.where(finite, n, k), new, kept), metrics

    mapped = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, None, 0, None),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )
    if jax.process_count() == 1:
        # The same program without pmap's own dispatch in Python, 0.1 ms a step on a CPU. (Among
        # several processes that dispatch is what joins their arrays.)
        mapped = jax.jit(mapped, donate_argnums=0)
    count = len(jax.local_devices() if devices is None else devices)

    def train_step(state, frozen, batch, key):
        return mapped(state, frozen, split(batch, count), key)

    return train_step
