"""Merging: the parameters of a model with adapters of its weights.

    W_merged = W + sum_i w_i dW_i + sum_j w_j (W'_j - W)

over adapters i that add to the weight, and adapters j that set its norms (DoRA): each W'_j is that
of the adapter alone at full strength.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion.adapters.low_rank.deltas import Decomposed, Delta, Deltas
from diffusion.adapters.low_rank.products import product
from diffusion.levels import Array

Params = Mapping[str, Any]
Strength = float | Array | Mapping[str, float | Array]
"""Of all of an adapter's deltas, or of each by the path of its parameter."""


def merge(params: Params, adapters: Sequence[tuple[Deltas, Strength]]) -> Params:
    """The parameters with adapters, each at its strength.

    Sums are in float32, parameters keep their dtypes, and ``params`` stays as it is. Traceable in
    the strengths: others compile nothing, and ``vmap`` over them makes a grid.

    Args:
      params: a pipeline's, {"network": ..., "encoders": [...]}.
      adapters: deltas by paths such as "network/conv_in/kernel" and "encoders/0/...".

    Raises:
      ValueError: there is no such parameter; the message names the nearest.
    """
    numbered = {
        name: {str(i): tree for i, tree in enumerate(trees)} if isinstance(trees, list) else trees
        for name, trees in params.items()
    }
    flat = flatten_dict(numbered, sep="/", keep_empty_nodes=True)
    changes: dict[str, list[tuple[Delta, Any]]] = {}
    for deltas, strength in adapters:
        for path, delta in deltas.items():
            if path not in flat:
                near = ", ".join(get_close_matches(path, flat, 1)) or "none"
                raise ValueError(f"the model has no parameter {path}; nearest: {near}")
            own = strength[path] if isinstance(strength, Mapping) else strength
            changes.setdefault(path, []).append((delta, jnp.asarray(own, jnp.float32)))
    for path, own in changes.items():
        flat[path] = _changed(flat[path], own, path.endswith("/kernel"))
    made = unflatten_dict(flat, sep="/")
    return {
        name: list(made[name].values()) if isinstance(params[name], list) else made[name]
        for name in params
    }


@partial(jax.jit, static_argnames="kernel")
def _changed(w: Array, changes: Sequence[tuple[Delta, Array]], kernel: bool) -> Array:
    """A parameter with its changes; compiled once for each shape of it and of their factors."""
    base = w.astype(jnp.float32)
    if kernel:  # [..., in, out] -> (out, in, ...)
        base = jnp.moveaxis(base, (-1, -2), (0, 1))
    changed = base
    for delta, strength in changes:
        if isinstance(delta, Decomposed):
            changed += strength * (_decomposed(base, delta) - base)
        else:
            changed += strength * product(delta, base.shape)
    if kernel:
        changed = jnp.moveaxis(changed, (0, 1), (-1, -2))
    return changed.astype(w.dtype)


def _decomposed(w: Array, delta: Decomposed) -> Array:
    """m (W + dW) / ||W + dW||; no gradient flows through the norm, which is over m's axes of 1."""
    total = w + product(delta.delta, w.shape)
    magnitude = delta.magnitude.astype(jnp.float32)
    axes = tuple(i for i, n in enumerate(magnitude.shape) if n == 1)
    norm = jnp.sqrt(jnp.sum(total**2, axis=axes, keepdims=True))
    return magnitude * total / jax.lax.stop_gradient(norm)
