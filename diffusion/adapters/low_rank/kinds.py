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
import numpy as np

from diffusion.adapters.low_rank.deltas import Delta, Hadamard, Kronecker, LowRank
from diffusion.levels import Array

Shape = tuple[int, ...]


class Begin(NamedTuple):
    """How a factor begins: uniform in +-bound, normal with this deviation, or 0 without either."""

    shape: Shape
    bound: float = 0.0
    deviation: float = 0.0


class Kind(NamedTuple):
    """A kind of adapter.

    Attributes:
      begin: (shape (out, in[, kh, kw]) of the weight, rank, normal) -> how each factor begins. With
        ``normal``, which LoRA alone has, A has the deviation 1 / rank.
      delta: (factors, scale) -> dW.
    """

    begin: Callable[[Shape, int, bool], dict[str, Begin]]
    delta: Callable[[Mapping[str, Array], Array], Delta]


def init(key: Array, begins: Mapping[str, Mapping[str, Begin]]) -> dict[str, dict[str, Array]]:
    """The factors of all layers, whose random numbers are drawn at once: that compiles quickly."""
    size = sum(math.prod(b.shape) for own in begins.values() for b in own.values())
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jax.random.uniform(key, (size,), minval=least)
    normal = 2**0.5 * jax.lax.erf_inv(uniform)
    place, made = 0, {}
    for layer, own in begins.items():
        made[layer] = {}
        for name, b in own.items():
            end = place + math.prod(b.shape)
            if b.bound or b.deviation:
                drawn, factor = (uniform, b.bound) if b.bound else (normal, b.deviation)
                made[layer][name] = factor * drawn[place:end].reshape(b.shape)
            else:
                made[layer][name] = jnp.zeros(b.shape)
            place = end
    return made


def uniform(*shape: int) -> Begin:
    """[r, ...], uniform in +-1 / sqrt(of the other axes' size)."""
    return Begin(shape, bound=math.prod(shape[1:]) ** -0.5)


def halves(number: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to each other, the smaller one first."""
    low = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    return low, number // low


def _lora(shape: Shape, rank: int, normal: bool) -> dict[str, Begin]:
    out, *rest = shape
    down = Begin((rank, *rest), deviation=1 / rank) if normal else uniform(rank, *rest)
    return {"down": down, "up": Begin((out, rank, *(1,) * (len(shape) - 2)))}


def _loha(shape: Shape, rank: int, normal: bool) -> dict[str, Begin]:
    """Deviations 0.1, 1, 0 and 1, as in LyCORIS."""
    del normal
    a, b = (shape[0], rank), (rank, math.prod(shape[1:]))
    deviations = {"w1_a": (a, 0.1), "w1_b": (b, 1.0), "w2_a": (a, 0.0), "w2_b": (b, 1.0)}
    return {name: Begin(own, deviation=d) for name, (own, d) in deviations.items()}


def _lokr(shape: Shape, rank: int, normal: bool) -> dict[str, Begin]:
    """w1 is whole, and so is w2 where two factors of this rank would be no smaller."""
    del normal
    (o1, o2), (i1, i2) = halves(shape[0]), halves(shape[1])
    w1 = uniform(o1, i1)
    if 2 * rank >= max(o2, i2):
        return {"w1": w1, "w2": Begin((o2, i2, *shape[2:]))}
    w2_b = Begin((rank, i2 * math.prod(shape[2:])))
    return {"w1": w1, "w2_a": uniform(o2, rank), "w2_b": w2_b}


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
