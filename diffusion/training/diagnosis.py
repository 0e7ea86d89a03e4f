"""What to say of a step whose loss or gradients were not finite."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion.levels import Array
from diffusion.objectives.objective import Batch, Context

NAMED = 5  # examples


def examine(
    objective: Any, params: Any, frozen: Any, ema: Any, batch: Batch, key: Array, step: int
) -> list[str]:
    """Which parameters or examples are to blame, a line each; at most ``NAMED`` examples.

    Each example's loss and gradient are computed alone, one after another. ``key`` is the run's,
    and ``step`` the number of steps done before.
    """
    params, frozen, ema = map(_here, (params, frozen, ema))
    if params is not None:
        finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params)
        for path, leaf in jax.tree.leaves_with_path(finite):
            if not leaf:
                name = jax.tree_util.keystr(path)
                return [f"the parameters themselves are not finite, as params{name}"]
    key = jax.random.fold_in(key, step)
    batch = {name: np.asarray(value) for name, value in batch.items()}
    size = len(next(iter(batch.values())))
    batch.setdefault("index", np.arange(size, dtype=np.int32))
    broken = {  # name -> [B]: an example's numbers are not finite
        name: ~np.isfinite(value.reshape(size, -1).astype(np.float32)).all(-1)
        for name, value in batch.items()
        if jnp.issubdtype(value.dtype, jnp.floating)
    }
    losses = norms = np.zeros(size)
    if params is not None:
        with contextlib.suppress(RuntimeError, MemoryError):  # what is known must still be said
            losses, norms = _alone(objective, params, frozen, ema, batch, key, step)
    blamed = ~(np.isfinite(losses) & np.isfinite(norms))
    blamed = np.logical_or.reduce([blamed, *broken.values()])
    if not blamed.any():
        return ["each example alone gives a finite loss and gradient: only their sum does not"]
    if has_levels := hasattr(objective, "levels"):
        levels = jax.device_get(objective.levels(key, jnp.asarray(batch["index"])))
    lines = []
    for i in np.flatnonzero(blamed)[:NAMED]:
        line = f"example {batch['index'][i]} of the batch"
        if has_levels:
            ratio = levels.sigma[i] / max(levels.alpha[i], 1e-30)
            line += f": t {levels.t[i]:.4g}, sigma/alpha {ratio:.4g}"
        if not np.isfinite(losses[i] + norms[i]):
            line += f", loss {losses[i]:.4g}, gradient_norm {norms[i]:.4g}"
        bad = [name for name, rows in broken.items() if rows[i]]
        if bad:
            line += f"; its data are not finite ({', '.join(bad)})"
        lines.append(line)
    if blamed.sum() > NAMED:
        lines.append(f"and {blamed.sum() - NAMED} more of {size} examples")
    return lines


def _here(tree: Any) -> Any:
    """As this process alone can compute with it; None if a part of it lies elsewhere."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if all(leaf.is_fully_addressable for leaf in leaves):
        return tree
    if all(leaf.is_fully_replicated for leaf in leaves):
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
    return None


def _alone(
    objective: Any, params: Any, frozen: Any, ema: Any, batch: Batch, key: Array, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient's norm of each example [B]."""

    @jax.jit
    def every(params, frozen, ema, key, batch):
        context = Context(frozen, ema, jnp.int32(step), train=True)

        def one(example):
            single = {name: value[None] for name, value in example.items()}
            value, gradient = jax.value_and_grad(
                lambda params: objective.loss(params, context, single, key)[0]
            )(params)
            return value, optax.tree.norm(gradient)

        return jax.lax.map(one, batch)

    return jax.device_get(every(params, frozen, ema, key, batch))
