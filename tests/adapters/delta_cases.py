"""Deltas of every kind with random factors, and their dW in float64 from the definitions."""

import numpy as np

from diffusion.adapters.low_rank.deltas import Full, Hadamard, Kronecker, LowRank

MATRIX, CONV, POINTWISE = (6, 4), (6, 4, 3, 2), (6, 4, 1, 1)
TUCKER = "mn...,mo,ni->oi..."


def randoms(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).astype(dtype)


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def low_rank(shape, r, scale=0.5, seed=0, axes=None, dtype=np.float32):
    """LoRA, with factors of ``axes`` axes; each number of dW is a sum over r."""
    new, (out, width, *kernel) = randoms(seed, dtype), shape
    extra = (axes or len(shape)) - 2
    down = new(r, width, *(kernel or (1,) * extra))[(..., *(0,) * (2 + len(kernel) - 2 - extra))]
    up = new(out, r, *(1,) * extra)
    b, a = wide(up.reshape(out, r), down.reshape(r, width, *kernel))
    dw = scale * sum(np.multiply.outer(b[:, k], a[k]) for k in range(r))
    return LowRank(down, up, np.float32(scale)), dw


def tucker(shape, r, seed=0):
    new, (out, width, *kernel) = randoms(seed), shape
    down, up, mid = new(r, width, 1, 1), new(out, r, 1, 1), new(r, r, *kernel)
    b, a, c = wide(up[..., 0, 0], down[..., 0, 0], mid)
    return LowRank(down, up, np.float32(2), mid), 2 * np.einsum(TUCKER, c, b.T, a)


def hadamard(shape, r, cores=False, seed=0):
    new, (out, width, *kernel) = randoms(seed), shape
    if cores:
        parts = [new(r, out), new(r, width), new(r, out), new(r, width)]
        t1, t2 = new(r, r, *kernel), new(r, r, *kernel)
        a, b, c, d, s, t = wide(*parts, t1, t2)
        dw = np.einsum(TUCKER, s, a, b) * np.einsum(TUCKER, t, c, d)
        return Hadamard(*parts, np.float32(0.3), t1, t2), np.float32(0.3) * dw
    flat = width * int(np.prod(kernel))
    parts = [new(out, r), new(r, flat), new(out, r), new(r, flat)]
    a, b, c, d = wide(*parts)
    return Hadamard(*parts, np.float32(0.3)), np.float32(0.3) * ((a @ b) * (c @ d)).reshape(shape)


def kronecker(shape, factored=(False, True), core=False, seed=0, axes=None):
    """LoKr of out = 2 x 3 and in = 2 x 2; ``factored`` says whether w1, w2 are products."""
    new, r, kernel = randoms(seed), 2, shape[2:]
    flat = 2 * int(np.prod(kernel))
    w1, w2 = (new(2, r), new(r, 2)), (new(3, r), new(r, flat))
    whole1, whole2 = (wide(*w)[0] @ wide(*w)[1] for w in (w1, w2))
    if not factored[0]:
        w1 = new(2, 2)
        (whole1,) = wide(w1)
    if core:
        w2 = (new(r, 3), new(r, 2), new(r, r, *kernel))
        a, b, c = wide(*w2)
        whole2 = np.einsum(TUCKER, c, a, b)
    elif not factored[1]:
        w2 = new(3, 2, *(kernel if axes is None else (1,) * (axes - 2)))
        (whole2,) = wide(w2)
    whole2, dw = whole2.reshape(3, 2, *kernel), np.zeros(shape)
    for o in range(6):
        for i in range(4):
            dw[o, i] = 0.7 * whole1[o // 3, i // 2] * whole2[o % 3, i % 2]
    return Kronecker(w1, w2, np.float64(0.7)), dw


def full(shape, seed=0):
    diff = randoms(seed)(*shape)
    return Full(diff, np.float32(1.5)), 1.5 * diff.astype(np.float64)


def cases():
    """Name -> (delta, dW)."""
    made = {"bias": full((6,)), "LoRA, float16": low_rank(CONV, 3, dtype=np.float16)}
    for name, shape in (("matrix", MATRIX), ("conv", CONV), ("1 x 1", POINTWISE)):
        made |= {
            f"LoRA, {name}": low_rank(shape, 3),
            f"LoHa, {name}": hadamard(shape, 2),
            f"full, {name}": full(shape),
        }
        made |= {
            f"LoKr, {name}, {first}, {second}": kronecker(shape, (first, second))
            for first in (False, True)
            for second in (False, True)
        }
    return made | {
        "LoRA of a matrix, 4 axes": low_rank(MATRIX, 3, axes=4),
        "LoRA of 1 x 1, 2 axes": low_rank(POINTWISE, 3, axes=2),
        "LoKr of a matrix, 4 axes": kronecker(MATRIX, (False, False), axes=4),
        "LoRA, Tucker": tucker(CONV, 3),
        "LoHa, Tucker": hadamard(CONV, 2, cores=True),
        "LoKr, Tucker": kronecker(CONV, core=True),
    }
