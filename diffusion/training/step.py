"""One training step, the same on every device.

How it lies over the devices is ``parallel``'s: what is here is one function for every layout. The
state is donated: the new one takes the old one's memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from diffusion import ema as ema_lib
from diffusion.levels import Array
from diffusion.objectives.objective import Batch, Context, Loss
from diffusion.training import parallel as parallel_lib
from diffusion.training.optimizers import Optimizer
from diffusion.training.state import TrainState


@jax.tree_util.register_pytree_node_class
class Packed(Mapping[str, Any]):
    """Numbers by name (arrays or tuples of them), as one vector, for one transfer to the host."""

    def __init__(self, vector: Array, structure: Any, shapes: tuple[tuple[int, ...], ...]):
        self._vector, self._structure, self._shapes = vector, structure, shapes

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Packed:
        """Packs ``values``; within a jitted function."""
        leaves, structure = jax.tree.flatten(dict(values))
        vector = jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])
        return cls(vector, structure, tuple(jnp.shape(x) for x in leaves))

    def _unpacked(self) -> dict[str, Any]:
        leaves, begin = [], 0
        for shape in self._shapes:
            end = begin + math.prod(shape)
            leaves.append(self._vector[begin:end].reshape(shape))
            begin = end
        return jax.tree.unflatten(self._structure, leaves)

    def fetched(self) -> dict[str, Any]:
        """The values as NumPy arrays, on the host; waits until they are computed."""
        return jax.device_get(self)._unpacked()

    def __getitem__(self, name: str) -> Any:
        return self._unpacked()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._unpacked())

    def __len__(self) -> int:
        return len(self._unpacked())

    def tree_flatten(self) -> tuple[tuple[Array], Any]:
        return (self._vector,), (self._structure, self._shapes)

    @classmethod
    def tree_unflatten(cls, fixed: Any, leaves: tuple[Array]) -> Packed:
        return cls(leaves[0], *fixed)


Step = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Packed]]


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
      objective: see ``objectives.objective``; its own ``step``, or one gradient step on its loss.
      emas: averages' profiles by name.
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
    tools = StepTools(layout, optimizer, emas, accumulate)
    own_step = getattr(objective, "step", None) or partial(gradient_step, objective)

    def step(state: TrainState, frozen: Any, batch: Batch, key: Array):
        return own_step(tools, state, frozen, batch, jax.random.fold_in(key, state.step))

    return layout.compile(step)


def gradient_step(
    objective: Any, tools: StepTools, state: TrainState, frozen: Any, batch: Batch, key: Array
) -> tuple[TrainState, Packed]:
    """One gradient step on the objective's loss; ``key`` is the step's own."""
    context = tools.context(state, frozen)
    grads, metrics = tools.gradients(
        lambda params, piece: objective.loss(params, context, piece, key), state.params, batch
    )
    return tools.finish(state, tools.updated(state, grads), grads, metrics)


@dataclasses.dataclass(frozen=True)
class StepTools:
    """What a step is made of, in one layout (see ``objectives.objective.Tools``)."""

    layout: parallel_lib.Layout
    optimizer: Optimizer
    emas: Mapping[str, ema_lib.Profile]
    accumulate: int = 1

    def context(self, state: TrainState, frozen: Any) -> Context:
        return Context(frozen, lax.stop_gradient(state.ema), state.step, train=True)

    def gradients(self, loss: Loss, params: Any, batch: Batch) -> tuple[Any, dict]:
        """The gradient of ``loss(params, piece)``, and its metrics with "loss" among them."""
        layout = self.layout

        def measured(params, piece):
            with layout.tracing(len(next(iter(piece.values())))):
                value, metrics = loss(params, widened(piece))
            return value, {**metrics, "loss": value}

        def gradient(piece):
            grads, metrics = jax.grad(measured, has_aux=True)(params, piece)
            return layout.keep(grads), metrics

        if self.accumulate == 1:
            return layout.mean(gradient(batch))
        pieces = layout.split(batch, self.accumulate)
        first = jax.tree.map(lambda x: x[0], pieces)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first))
        total, _ = lax.scan(
            lambda total, piece: (jax.tree.map(jnp.add, total, gradient(piece)), None),
            zeros,
            pieces,
        )
        return layout.mean(jax.tree.map(lambda x: x / self.accumulate, total))

    def updated(self, state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = self.optimizer.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = {
            name: ema_lib.update(state.ema[name], params, profile(state.step + 1))
            for name, profile in self.emas.items()
        }
        return TrainState(state.step + 1, params, opt_state, averages, state.extra)

    def finish(
        self, old: TrainState, new: TrainState, grads: Any, metrics: Mapping[str, Any]
    ) -> tuple[TrainState, Packed]:
        """The new state, or the old one with the new count where the step was not finite."""
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        packed = Packed.of(
            {
                **metrics,
                "gradient_norm": norm,
                "parameter_norm": optax.tree.norm(new.params),
                "learning_rate": self.optimizer.learning_rate(old.step),
                "finite": finite.astype(jnp.float32),
            }
        )
        kept = old.replace(step=new.step)
        return jax.tree.map(lambda n, k: jnp.where(finite, n, k), new, kept), packed


def widened(batch: Batch) -> dict[str, Array]:
    """What came as bfloat16, to be quick on its way, as float32: all is computed in that."""
    return {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in batch.items()}
