"""The changes dW of weights that their factors make, in PyTorch's layout and in float32."""

from __future__ import annotations

import math
from functools import singledispatch

import jax.numpy as jnp

from diffusion.adapters.low_rank.deltas import Delta, Full, Hadamard, Kronecker, LowRank
from diffusion.levels import Array


def product(delta: Delta, shape: tuple[int, ...]) -> Array:
    """dW of a weight of ``shape`` (out, in[, kh, kw]), or of a bias (out,).

    Factors of a matrix fit a 1 x 1 convolution and the other way round.

    Raises:
      ValueError: the factors do not fit the weight.
    """
    made = matrix(delta)
    check(made.shape, shape)
    return made.reshape(shape)


@singledispatch
def matrix(delta: Delta) -> Array:
    """dW as (out, in kh kw), or (out, 1) of a bias."""
    raise TypeError(f"{type(delta).__name__} is not a sum that is added to a weight")


@matrix.register
def _low_rank(delta: LowRank) -> Array:
    return matmul(*factors(delta))


@matrix.register
def _hadamard(delta: Hadamard) -> Array:
    tucker = delta.t1 is not None
    a, b = ((w.T if tucker else w) for w in (delta.w1_a, delta.w2_a))
    first, second = _whole((a, delta.w1_b, delta.t1)), _whole((b, delta.w2_b, delta.t2))
    return delta.scale * first * second


@matrix.register
def _kronecker(delta: Kronecker) -> Array:
    w1, w2 = (w if not isinstance(w, tuple) else _of_kronecker(*w) for w in (delta.w1, delta.w2))
    return delta.scale * jnp.kron(_flat(w1), _flat(w2))


@matrix.register
def _full(delta: Full) -> Array:
    return delta.scale * _flat(delta.diff)


def factors(delta: LowRank) -> tuple[Array, Array]:
    """The two matrices whose product is dW: (out, r) with the scale in it, (r, in kh kw).

    A core is multiplied into the second.
    """
    up, down = _flat(delta.up), _flat(delta.down)
    if delta.mid is not None:
        core = jnp.einsum("mnhw,ni->mihw", float32(delta.mid), down, precision="highest")
        down = _flat(core)
    return up * delta.scale, down


def check(made: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a change (out, in kh kw) is one of a weight of ``shape``."""
    if made != (shape[0], math.prod(shape[1:])):
        raise ValueError(f"factors make a change {made}, which does not fit a weight {shape}")


def float32(a: Array) -> Array:
    """``a`` in float32, in which everything here is computed."""
    return jnp.asarray(a, jnp.float32)


def matmul(a: Array, b: Array) -> Array:
    """Matrix product without the shortcuts that accelerators take by default."""
    return jnp.matmul(a, b, precision="highest")


def _of_kronecker(a: Array, b: Array, core: Array | None = None) -> Array:
    return _whole((a if core is None else a.T, b, core))


def _whole(parts: tuple[Array, Array, Array | None]) -> Array:
    """(out, in kh kw) of (out, r), (r, in kh kw), or (out, r), (r, in) and (r, r, kh, kw)."""
    up, down, core = parts
    return matrix(LowRank(down, up, 1.0, core))


def _flat(a: Array) -> Array:
    """(out, all others)."""
    return float32(a).reshape(len(a), -1)
