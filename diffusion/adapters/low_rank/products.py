"""The changes dW of weights that their factors make, in PyTorch's layout and in float32."""

from __future__ import annotations

from functools import singledispatch

import jax.numpy as jnp

from diffusion.adapters.low_rank.deltas import Delta, Full, Hadamard, Kronecker, LowRank
from diffusion.levels import Array


@singledispatch
def product(delta: Delta, shape: tuple[int, ...]) -> Array:
    """dW of a weight of ``shape`` (out, in[, kh, kw]), or of a bias (out,)."""
    raise TypeError(f"{type(delta).__name__} is not a sum that is added to a weight")


@product.register
def _low_rank(delta: LowRank, shape: tuple[int, ...]) -> Array:
    return delta.scale * _multiplied(delta.up, delta.down, delta.mid).reshape(shape)


@product.register
def _hadamard(delta: Hadamard, shape: tuple[int, ...]) -> Array:
    tucker = delta.t1 is not None
    a, b = ((w.T if tucker else w) for w in (delta.w1_a, delta.w2_a))
    first = _multiplied(a, delta.w1_b, delta.t1)
    return delta.scale * (first * _multiplied(b, delta.w2_b, delta.t2)).reshape(shape)


@product.register
def _kronecker(delta: Kronecker, shape: tuple[int, ...]) -> Array:
    w1, w2 = (_whole(w) for w in (delta.w1, delta.w2))
    w2 = w2.reshape(*w2.shape[:1], -1, *shape[2:])  # (o2, i2, kh, kw)
    w1 = w1.reshape(*w1.shape[:2], *(1,) * (len(shape) - 2))
    return delta.scale * jnp.kron(w1, w2).reshape(shape)


@product.register
def _full(delta: Full, shape: tuple[int, ...]) -> Array:
    return delta.scale * _float32(delta.diff).reshape(shape)


def _whole(w: Array | tuple[Array, ...]) -> Array:
    if not isinstance(w, tuple):
        return _float32(w)
    a, b, *core = w
    return _multiplied(a.T if core else a, b, *core)


def _multiplied(up: Array, down: Array, core: Array | None = None) -> Array:
    """(out, in kh kw): up (out, r) times down (r, in kh kw), or with a core (r, r, kh, kw)."""
    up = _float32(up).reshape(len(up), -1)
    down = _float32(down).reshape(len(down), -1)
    if core is None:
        return jnp.matmul(up, down, precision="highest")
    made = jnp.einsum("om,mnhw,ni->oihw", up, _float32(core), down, precision="highest")
    return made.reshape(len(up), -1)


def _float32(a: Array) -> Array:
    return jnp.asarray(a, jnp.float32)
