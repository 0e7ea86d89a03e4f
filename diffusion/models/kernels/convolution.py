"""Convolutions in forms that take less work on a CPU.

They replace ``lax.conv_general_dilated`` in ``nn.Conv`` and have its signature.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffusion.levels import Array
from diffusion.models.kernels import winograd

VARIABLE, FORMS = "DIFFUSION_CONVOLUTIONS", ("fastest", "direct")
MAX_BYTES = 2**30  # most memory for a transformed image in Winograd's form
# A product of patches is the fastest up to this number of pixels in a batch, from this number of
# channels on.
MAX_PIXELS, MIN_CHANNELS = 64, 64

_direct: ContextVar[bool] = ContextVar("direct", default=False)


@contextmanager
def direct() -> Iterator[None]:
    """A context that traces networks with plain convolutions, as published FLOPs count them."""
    token = _direct.set(True)
    try:
        yield
    finally:
        _direct.reset(token)


def fewer_products() -> bool:
    """Whether these forms are used: on a CPU, since a GPU's libraries choose between such forms.

    ``DIFFUSION_CONVOLUTIONS=direct`` in the environment turns them off.
    """
    form = os.environ.get(VARIABLE) or FORMS[0]
    if form not in FORMS:
        raise ValueError(
            f"{VARIABLE} is {form!r} in the environment; expected {' or '.join(FORMS)}"
        )
    return form == "fastest" and jax.default_backend() == "cpu" and not _direct.get()


def three_by_three(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, *args: Any, **kwargs: Any
) -> Array:
    """3 x 3 convolution of x [B, H, W, C], stride 1, padded by zeros, in the fastest form.

    All other convolutions are those of ``lax.conv_general_dilated``.
    """
    plain = {
        *(tuple(strides), tuple(kwargs.get("lhs_dilation") or (1, 1))),
        tuple(kwargs.get("rhs_dilation") or (1, 1)),
    } == {(1, 1)}
    plain = plain and padding in ("SAME", [(1, 1)] * 2) and kernel.shape[:3] == (3, 3, x.shape[-1])
    if fewer_products() and plain:
        b, h, w, _ = x.shape
        small = b * h * w <= MAX_PIXELS or min(h, w) < 3
        if small and min(kernel.shape[2:]) >= MIN_CHANNELS:
            return by_patches(x, kernel)
        if x.dtype == kernel.dtype == jnp.float32 and tiles_pay(x.shape, kernel.shape[-1]):
            return winograd.convolve(x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, *args, **kwargs)


def tiles_pay(shape: Sequence[int], o: int) -> bool:
    """Whether Winograd's form is faster, from [B, H, W, C] to o channels (benchmarks/README.md).

    With few tiles the kernel's transformation takes more time than fewer products save, with few
    channels the image's transformation does.
    """
    b, h, w, c = shape
    tiles = b * (-(-h // 2)) * (-(-w // 2))
    products = c * o / (c + o)  # per transformed number
    enough = products >= (20 if tiles >= 512 else 38) and tiles >= max(64, max(c, o) / 10)
    return enough and 16 * tiles * max(c, o) * 4 <= MAX_BYTES


def by_patches(x: Array, kernel: Array) -> Array:
    """3 x 3 convolution, padded by zeros, as one matrix product of each pixel's 3 x 3 neighbours.

    It serves images so small that reading the kernel takes most of the time. Besides, XLA's CPU
    compiler makes slow programs of convolutions of images that are smaller than the kernel.
    """
    _, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(near, axis=-1) @ kernel.reshape(9 * c, -1)


def doubling_pays(x: Array) -> bool:
    """Whether ``of_doubled`` is faster; on small images summing the kernel takes too much time."""
    return fewer_products() and math.prod(x.shape[:-1]) > MAX_PIXELS


def of_doubled(x: Array, kernel: Array, *_: Any, dimension_numbers: Any, **__: Any) -> Array:
    """3 x 3 convolution, padded by zeros, of x [B, H, W, C] doubled by nearest neighbours:
    [B, 2H, 2W, O].

    Rows 2i and 2i + 1 of the doubled image are both row i of x. So the three rows of the kernel
    [3, 3, C, O] meet only two rows of x: i - 1, i, i around row 2i, and i, i, i + 1 around row
    2i + 1; columns likewise. Each of the four kinds of output pixels is thus a convolution of x
    with 2 x 2 sums of the kernel: 16 products per pixel of x instead of 36.
    """
    b, h, w, _ = x.shape

    def halves(k: Array) -> tuple[Array, Array]:  # sums along the first axis, 3 -> 2
        return jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]])

    convolve = partial(lax.conv_general_dilated, dimension_numbers=dimension_numbers)
    rows = []
    for i, of_rows in enumerate(halves(kernel)):
        pixels = []
        for j, transposed in enumerate(halves(of_rows.swapaxes(0, 1))):
            padding, small = ((1 - i, i), (1 - j, j)), transposed.swapaxes(0, 1)
            pixels.append(convolve(x, small, (1, 1), padding))
        rows.append(jnp.stack(pixels, axis=3))  # [B, H, W, 2, O]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)
