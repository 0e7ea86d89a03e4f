"""Merging: the parameters of a model with adapters of its weights.

    W_merged = W + sum_i w_i dW_i + sum_j w_j (W'_j - W)

over adapters i that add to the weight, and adapters j that set its norms (DoRA): each W'_j is that
of the adapter alone at full strength, so that the order of adapters means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion.adapters.low_rank.deltas import Decomposed, Delta, Deltas, LowRank
from diffusion.adapters.low_rank.products import check, factors, float32, matmul, product
from diffusion.levels import Array

Params = Mapping[str, Any]
Strength = float | Array | Mapping[str, float | Array]
"""Of all of an adapter's deltas, or of each by the path of its parameter."""
ROUNDING = 1e-6
"""Norms that differ by less than this share are the same, but for the order of their sums."""


def merge(params: Params, adapters: Sequence[tuple[Deltas, Strength]]) -> Params:
    """The parameters with adapters, each at its strength.

    Sums are in float32, parameters keep their dtypes, and ``params`` stays as it is: to keep it is
    to be able to take the adapters out again. At strength 0 the result is ``params``, to the bit.
    Traceable in the strengths: others compile nothing, and ``vmap`` over them makes a grid.

    Args:
      params: a pipeline's, {"network": ..., "encoders": [...]}.
      adapters: deltas by paths such as "network/conv_in/kernel" and "encoders/0/..."; of stacked
        layers, whose kernels are [L, in, out], by those of matrices, "network/blocks/.../kernel/0".

    Raises:
      ValueError: there is no such parameter, and the message names the nearest; or the factors do
        not fit it.
    """
    stacks = flat_params(params)
    flat = matrices(stacks, {path for deltas, _ in adapters for path in deltas})
    changes: dict[str, list[tuple[Delta, Any]]] = {}
    for deltas, strength in adapters:
        for path, delta in deltas.items():
            if path not in flat:
                near = ", ".join(get_close_matches(path, flat, 1)) or "none"
                raise ValueError(f"the model has no parameter {path}; nearest: {near}")
            own = strength[path] if isinstance(strength, Mapping) else strength
            changes.setdefault(path, []).append((delta, float32(own)))
    for path, own in changes.items():
        try:
            flat[path] = changed(flat[path], own, is_kernel(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for path in stacks.keys() - flat.keys():
        flat[path] = jnp.stack([flat.pop(f"{path}/{i}") for i in range(len(stacks[path]))])
    made = unflatten_dict(flat, sep="/")
    return {
        name: list(made[name].values()) if isinstance(params[name], list) else made[name]
        for name in params
    }


def flat_params(params: Params) -> dict[str, Any]:
    """A pipeline's parameters by path; those of lists have numbers, "encoders/0/...".

    Nodes without any are kept.
    """
    numbered = {
        name: {str(i): tree for i, tree in enumerate(trees)} if isinstance(trees, list) else trees
        for name, trees in params.items()
    }
    return flatten_dict(numbered, sep="/", keep_empty_nodes=True)


def matrices(flat: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Parameters by path, where the stacks of which ``paths`` name matrices are taken apart."""
    made: dict[str, Any] = {}
    wanted = {whole(path) for path in paths} - set(paths)
    for path, w in flat.items():
        if path in wanted and w.ndim == 3:
            made |= {f"{path}/{i}": own for i, own in enumerate(w)}
        else:
            made[path] = w
    return made


def whole(path: str) -> str:
    """The path of a parameter, of that of one of its matrices if it is a stack."""
    return re.sub(r"(?<=/kernel)/\d+$", "", path)


def is_kernel(path: str) -> bool:
    """Whether a parameter is [..., in, out], which is (out, in, ...) in PyTorch's layout."""
    return whole(path).rpartition("/")[2] == "kernel"


def torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(out, in, kh, kw) of a kernel [kh, kw, in, out]."""
    return (shape[-1], shape[-2], *shape[:-2])


def from_torch(w: Array) -> Array:
    """A weight (out, in, kh, kw) in our layout."""
    return jnp.moveaxis(w, (0, 1), (-1, -2))


@partial(jax.jit, static_argnames="kernel")
def changed(w: Array, changes: Sequence[tuple[Delta, Array]], kernel: bool) -> Array:
    """A parameter with its changes, each a delta and its strength.

    Compiled once for each shape of the parameter and of the factors.
    """
    base = float32(w)
    shape = torch_shape(base.shape) if kernel else base.shape
    ours = from_torch if kernel else (lambda a: a)
    low, total = [], None
    for delta, strength in changes:
        if isinstance(delta, LowRank):
            up, down = factors(delta)
            check((len(up), down.shape[1]), shape)
            low.append((up * strength, down))
            continue
        if isinstance(delta, Decomposed):
            change = _decomposed(base, delta, shape, ours) - base
        else:
            change = ours(product(delta, shape))
        total = strength * change if total is None else total + strength * change
    if low:
        change = _joined(low, shape, kernel)
        total = change if total is None else total + change
    return _plus(base, total).astype(w.dtype)


def _joined(low: Sequence[tuple[Array, Array]], shape: tuple[int, ...], kernel: bool) -> Array:
    """The sum of products (out, r), (r, in kh kw), computed as one, in our layout."""
    up = jnp.concatenate([up for up, _ in low], axis=1)
    down = jnp.concatenate([down for _, down in low])
    if not kernel:
        return matmul(up, down).reshape(shape)
    # It is the small factor that changes its layout, not the product.
    down = down.reshape(len(down), *shape[1:])
    down = jnp.moveaxis(down, (0, 1), (-1, -2))  # [kh, kw, in, r]
    return matmul(down, up.T)


def _decomposed(base: Array, delta: Decomposed, shape: tuple[int, ...], ours: Any) -> Array:
    """m (W + dW) / ||W + dW||; no gradient flows through the norm, which is over m's axes of 1."""
    total = base + ours(product(delta.delta, shape))
    magnitude = float32(delta.magnitude)
    magnitude = ours(magnitude.reshape(*magnitude.shape, *(1,) * (base.ndim - magnitude.ndim)))
    axes = tuple(i for i, n in enumerate(magnitude.shape) if n == 1)
    norm = jnp.sqrt(jnp.sum(total**2, axis=axes, keepdims=True))
    norm = jnp.where(jnp.abs(norm - magnitude) <= ROUNDING * magnitude, magnitude, norm)
    norm = jax.lax.stop_gradient(jnp.where(norm == 0, 1, norm))
    return total * (magnitude / norm)


@jax.custom_jvp
def _plus(w: Array, change: Array) -> Array:
    """w + change, and w where there is no change: -0 stays -0."""
    return jnp.where(change == 0, w, w + change)


_plus.defjvps(lambda tangent, *_: tangent, lambda tangent, *_: tangent)
