"""The kinds of trained adapters of weights: how their factors begin, and the deltas they make.

Every kind begins with dW = 0. Factors are float32 and have the shapes and names that files give
them (``deltas``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion.adapters.low_rank.deltas import Delta, Hadamard, Kronecker, LowRank
from diffusion.levels import Array

Factors = dict[str, Array]
Shape = tuple[int, ...]


class Kind(NamedTuple):
    """A kind of adapter.

    Attributes:
      init: (key, shape (out, in[, kh, kw]) of the weight, rank, normal) -> factors. The random ones
        are normal with deviation 1 / rank, or uniform in +-1 / sqrt(in kh kw).
      delta: (factors, scale) -> dW.
    """

    init: Callable[[Array, Shape, int, bool], Factors]
    delta: Callable[[Mapping[str, Array], Array], Delta]


def uniform(key: Array, shape: Shape) -> Array:
    """[r, ...], uniform in +-1 / sqrt(of the other axes' size)."""
    bound = math.prod(shape[1:]) ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def halves(number: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to each other, the smaller one first."""
    low = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    return low, number // low


def _lora(key: Array, shape: Shape, rank: int, normal: bool) -> Factors:
    out, *rest = shape
    down = (rank, *rest)
    first = jax.random.normal(key, down) / rank if normal else uniform(key, down)
    return {"down": first, "up": jnp.zeros((out, rank, *(1,) * (len(shape) - 2)))}


def _loha(key: Array, shape: Shape, rank: int, normal: bool) -> Factors:
    """Deviations 0.1, 1, 0 and 1, as in LyCORIS."""
    del normal
    keys = jax.random.split(key, 3)
    a, b = (shape[0], rank), (rank, math.prod(shape[1:]))
    return {
        "w1_a": 0.1 * jax.random.normal(keys[0], a),
        "w1_b": jax.random.normal(keys[1], b),
        "w2_a": jnp.zeros(a),
        "w2_b": jax.random.normal(keys[2], b),
    }


def _lokr(key: Array, shape: Shape, rank: int, normal: bool) -> Factors:
    """w1 is whole, and so is w2 where two factors of this rank would be no smaller."""
    del normal
    (o1, o2), (i1, i2) = halves(shape[0]), halves(shape[1])
    first, second = jax.random.split(key)
    w1 = uniform(first, (o1, i1))
    if 2 * rank >= max(o2, i2):
        return {"w1": w1, "w2": jnp.zeros((o2, i2, *shape[2:]))}
    w2_b = jnp.zeros((rank, i2 * math.prod(shape[2:])))
    return {"w1": w1, "w2_a": uniform(second, (o2, rank)), "w2_b": w2_b}


def _kronecker(own: Mapping[str, Array], scale: Array) -> Kronecker:
    if "w2" in own:
        return Kronecker(own["w1"], own["w2"], jnp.ones_like(scale))
    return Kronecker(own["w1"], (own["w2_a"], own["w2_b"]), scale)


KINDS = {
    "lora": Kind(_lora, lambda own, scale: LowRank(own["down"], own["up"], scale)),
    "loha": Kind(
        _loha, lambda f, scale: Hadamard(f["w1_a"], f["w1_b"], f["w2_a"], f["w2_b"], scale)
    ),
    "lokr": Kind(_lokr, _kronecker),
}
