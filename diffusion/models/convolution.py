"""Convolutions in forms that take less work on a CPU.

They take the place of ``lax.conv_general_dilated`` in ``nn.Conv``, which calls them as it calls
that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffusion.levels import Array

# Measured (benchmarks/README.md): with fewer tiles the transformed kernels, with fewer channels the
# transformed images take more time than their products save.
MIN_TILES, MIN_CHANNELS, TILES_PER_CHANNEL = 512, 64, 2
MAX_BYTES = 2**30  # of the transformed image
MAX_PIXELS = 64  # of a batch, up to which a product of patches is the fastest
LAYOUT = ("NHWC", "HWIO", "NHWC")

_direct: ContextVar[bool] = ContextVar("direct", default=False)


@contextmanager
def direct() -> Iterator[None]:
    """Within, networks are traced with plain convolutions: published counts of FLOPs are theirs."""
    token = _direct.set(True)
    try:
        yield
    finally:
        _direct.reset(token)


def fewer_products() -> bool:
    """Whether these forms pay: on a CPU. A GPU's libraries choose between such forms themselves."""
    return jax.default_backend() == "cpu" and not _direct.get()


def three_by_three(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, *args: Any, **kwargs: Any
) -> Array:
    """3 x 3 convolution of x [B, H, W, C], stride 1, padded by zeros, as it is the fastest.

    Whatever else is asked for, ``lax.conv_general_dilated`` does.
    """
    plain = {
        *(tuple(strides), tuple(kwargs.get("lhs_dilation") or (1, 1))),
        tuple(kwargs.get("rhs_dilation") or (1, 1)),
    } == {(1, 1)}
    plain = plain and padding in ("SAME", [(1, 1)] * 2) and kernel.shape[:3] == (3, 3, x.shape[-1])
    if fewer_products() and plain and min(kernel.shape[2:]) >= MIN_CHANNELS:
        b, h, w, _ = x.shape
        if b * h * w <= MAX_PIXELS or min(h, w) < 3:
            return by_patches(x, kernel)
        tiles, most = b * (-(-h // 2)) * (-(-w // 2)), max(kernel.shape[2:])
        if (
            x.dtype == kernel.dtype == jnp.float32
            and tiles >= max(MIN_TILES, TILES_PER_CHANNEL * most)
            and 16 * tiles * most * x.dtype.itemsize <= MAX_BYTES
        ):
            return by_tiles(x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, *args, **kwargs)


def by_patches(x: Array, kernel: Array) -> Array:
    """``by_tiles``' convolution as one matrix product, of each pixel's 3 x 3 neighbours.

    For images so small that reading the kernel takes the time; XLA's CPU compiler, besides, turns
    convolutions of images smaller than their kernel into slow ones.
    """
    _, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(near, axis=-1) @ kernel.reshape(9 * c, -1)


@jax.custom_jvp
def by_tiles(x: Array, kernel: Array) -> Array:
    """3 x 3 convolution of x [B, H, W, C] with kernel [3, 3, C, O], stride 1, padded by zeros.

    Winograd's F(2 x 2, 3 x 3) (Lavin & Gray, 2015): of each 4 x 4 tile, overlapping the next by 2,
    sums of pixels are multiplied with sums of the kernel, and sums of those products are 2 x 2
    pixels of the result: 16 products for each and not 36. Derivatives are those of the plain
    convolution.
    """
    b, h, w, c = x.shape
    rows, columns = -(-h // 2), -(-w // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - h + 1), (1, 2 * columns - w + 1), (0, 0)))
    pixels = [
        [
            x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2].reshape(-1, c)
            for j in range(4)
        ]
        for i in range(4)
    ]
    image = _both_ways(_of_image, pixels)
    weights = _both_ways(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    products = [[image[i][j] @ weights[i][j] for j in range(4)] for i in range(4)]
    (y00, y01), (y10, y11) = _both_ways(_of_products, products)
    # Pixel (2r + i, 2s + j) is y_ij of tile (r, s).
    pairs = [jnp.stack([y00, y01], axis=1), jnp.stack([y10, y11], axis=1)]
    y = jnp.stack([pair.reshape(b, rows, 2 * columns, -1) for pair in pairs], axis=2)
    return y.reshape(b, 2 * rows, 2 * columns, -1)[:, :h, :w]


@by_tiles.defjvp
def _derivative(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)

    return by_tiles(x, kernel), plain(dx, kernel) + plain(x, dkernel)


def _of_image(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    return [a - c, b + c, c - b, b - d]


def _of_kernel(a: Array, b: Array, c: Array) -> list[Array]:
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _of_products(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    return [a + b + c, b - c - d]


def _both_ways(transform: Any, table: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """A transform along the columns of a table of arrays, then along its rows."""
    down = zip(*[transform(*column) for column in zip(*table)])
    return [transform(*row) for row in down]


def doubling_pays(x: Array) -> bool:
    """Whether ``of_doubled`` is faster: not where summing the kernel takes the time."""
    return fewer_products() and math.prod(x.shape[:-1]) > MAX_PIXELS


def of_doubled(x: Array, kernel: Array, *_: Any, dimension_numbers: Any, **__: Any) -> Array:
    """3 x 3 convolution, padded by zeros, of x [B, H, W, C] doubled by nearest neighbours.

    Rows 2i and 2i + 1 of the doubled image are both row i of x. So the three rows of the kernel
    [3, 3, C, O] fall on only two of x: on i - 1, i, i around row 2i, on i, i, i + 1 around row
    2i + 1; columns likewise. Each of the four kinds of output pixels is thus a convolution of x
    with 2 x 2 sums of the kernel: 16 products per pixel of x and not 36.

    Returns [B, 2H, 2W, O].
    """
    b, h, w, _ = x.shape

    def halves(k: Array) -> tuple[Array, Array]:  # sums along the first axis, 3 -> 2
        return jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]])

    rows = []
    for i, of_rows in enumerate(halves(kernel)):
        pixels = []
        for j, transposed in enumerate(halves(of_rows.swapaxes(0, 1))):
            padding = ((1 - i, i), (1 - j, j))
            small = transposed.swapaxes(0, 1)
            pixels.append(
                lax.conv_general_dilated(
                    x, small, (1, 1), padding, dimension_numbers=dimension_numbers
                )
            )
        rows.append(jnp.stack(pixels, axis=3))  # [B, H, W, 2, O]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)
