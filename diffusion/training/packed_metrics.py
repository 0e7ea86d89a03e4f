"""A step's metrics as one array, which one transfer brings to the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.levels import Array


@jax.tree_util.register_pytree_node_class
class Packed(Mapping[str, Any]):
    """Numbers by name (arrays or tuples of them), kept as one float32 vector.

    A dozen scalars fetched one by one cost a tenth of a millisecond, which small models notice.
    """

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
        """For JAX: one leaf."""
        return (self._vector,), (self._structure, self._shapes)

    @classmethod
    def tree_unflatten(cls, fixed: Any, leaves: tuple[Array]) -> Packed:
        """For JAX."""
        return cls(leaves[0], *fixed)
