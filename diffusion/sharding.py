"""Arrays that are sharded over devices: examples stay in place, and parameters are gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_mesh: ContextVar[Mesh | None] = ContextVar("mesh", default=None)  # within ``examples_stay``


@contextmanager
def examples_stay(sharding: NamedSharding, size: int) -> Iterator[None]:
    """A context in which linen modules are traced with inputs and outputs laid out by ``sharding``.

    Without it XLA may move activations instead of the parameters' shards. The layout applies to
    arrays whose first axis is a multiple of ``size``, the number of examples.
    """

    def hold(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.ndim == 0 or x.shape[0] % size or not x.size:
            return x
        return lax.with_sharding_constraint(x, sharding)

    def intercept(call, args, kwargs, context):
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        args, kwargs = jax.tree.map(hold, (args, kwargs))
        return jax.tree.map(hold, call(*args, **kwargs))

    token = _mesh.set(sharding.mesh)
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        _mesh.reset(token)


def everywhere(tree: Any) -> Any:
    """The arrays, within ``examples_stay`` whole on every device, for loops over small arrays,
    each round of which would otherwise wait for all devices."""
    mesh = _mesh.get()
    if mesh is None:
        return tree
    return lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def is_cut(x: Any) -> bool:
    """Whether an array is sharded over several devices."""
    return isinstance(x, jax.Array) and not x.is_fully_replicated
