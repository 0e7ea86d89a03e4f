"""3 x 3 convolutions by Winograd's F(2 x 2, 3 x 3) (Lavin & Gray, 2015), and their gradients.

An image is divided into 4 x 4 tiles, each overlapping the next by 2. Sums of each tile's pixels are
multiplied with sums of the kernel's numbers; sums of those products are 2 x 2 pixels of the result:
16 products for each pair of channels instead of 36.

A convolution y of x with a kernel is linear in both. It and its transposes, which map y to x and to
the kernel, are one primitive of JAX, ``three_by_three_p``. Its derivatives of any order, forward
and backward, are therefore convolutions by tiles again. From derivatives of sums of tiles, XLA's
CPU compiler would make slow programs.

Derivatives keep and read more arrays, so that tiles pay only from more channels on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from diffusion.levels import Array

Table = Sequence[Sequence[Array]]
LAYOUT = ("NHWC", "HWIO", "NHWC")
# With derivatives, tiles pay from this ratio on: input channels times output channels, divided by
# their sum, as measured (benchmarks/README.md).
DERIVATIVES_PAY = 60


def convolve(x: Array, kernel: Array) -> Array:
    """3 x 3 convolution of x [B, H, W, C] with kernel [3, 3, C, O], stride 1, padded by zeros."""
    return three_by_three_p.bind(x, kernel, of="y", differentiated=False)


def compute(a: Array, b: Array, of: str, differentiated: bool) -> Array:
    """The primitive in terms of others: 'y' of (x, kernel), 'x' of (y, kernel), 'kernel' of (x, y).

    'x' and 'kernel' are the cotangents that belong to a cotangent y of the convolution.
    """
    c, o = (a.shape[-1], b.shape[-1]) if of == "kernel" else b.shape[2:]
    if differentiated and not derivatives_pay(c, o):
        return directly(a, b, of)
    return _kernel(a, b) if of == "kernel" else _pixels(a, b, transposed=of == "x")


def derivatives_pay(c: int, o: int) -> bool:
    """Whether differentiated convolutions from c to o channels are computed by tiles."""
    return c * o >= DERIVATIVES_PAY * (c + o)


def directly(a: Array, b: Array, of: str) -> Array:
    """``compute`` by XLA's own convolutions."""

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)

    if of == "y":
        return plain(a, b)
    shape = jax.ShapeDtypeStruct(_shape_of(a, b, of), a.dtype)
    if of == "x":
        return jax.linear_transpose(lambda x: plain(x, b), shape)(a)[0]
    return jax.linear_transpose(lambda kernel: plain(a, kernel), shape)(b)[0]


def _shape_of(a: Array, b: Array, of: str) -> tuple[int, ...]:
    if of == "kernel":
        return (3, 3, a.shape[-1], b.shape[-1])
    return (*a.shape[:-1], b.shape[3 if of == "y" else 2])


def _pixels(x: Array, kernel: Array, transposed: bool) -> Array:
    """The convolution, or with ``transposed`` that by the turned and transposed kernel."""
    b, h, w, _ = x.shape
    weights = _both_ways(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    if transposed:  # a turn by 180 degrees exchanges the first and last of ``_of_kernel``'s sums
        order = (3, 1, 2, 0)
        weights = [[weights[i][j].T for j in order] for i in order]
    image = _of_tiles(x)
    products = [[image[i][j] @ weights[i][j] for j in range(4)] for i in range(4)]
    (y00, y01), (y10, y11) = _both_ways(_of_products, products)
    # Pixel (2r + i, 2s + j) is y_ij of tile (r, s).
    rows, columns = -(-h // 2), -(-w // 2)
    pairs = [jnp.stack([y00, y01], axis=1), jnp.stack([y10, y11], axis=1)]
    y = jnp.stack([pair.reshape(b, rows, 2 * columns, -1) for pair in pairs], axis=2)
    return y.reshape(b, 2 * rows, 2 * columns, -1)[:, :h, :w]


def _kernel(x: Array, y: Array) -> Array:
    """The kernel's cotangent: transposes of ``_of_products``, the products, ``_of_kernel``."""
    _, h, w, o = y.shape
    y = jnp.pad(y, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    pixels = [[y[:, i::2, j::2].reshape(-1, o) for j in range(2)] for i in range(2)]
    image, spread = _of_tiles(x), _both_ways(_to_products, pixels)
    weights = [[image[i][j].T @ spread[i][j] for j in range(4)] for i in range(4)]
    return jnp.stack([jnp.stack(row) for row in _both_ways(_to_kernel, weights)])


def _of_tiles(x: Array) -> list[list[Array]]:
    """Sums of each tile's pixels: 4 x 4 arrays [tiles, C]."""
    _, h, w, c = x.shape
    rows, columns = -(-h // 2), -(-w // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - h + 1), (1, 2 * columns - w + 1), (0, 0)))

    def pixel(i: int, j: int) -> Array:
        return x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2].reshape(-1, c)

    return _both_ways(_of_image, [[pixel(i, j) for j in range(4)] for i in range(4)])


def _of_image(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    return [a - c, b + c, c - b, b - d]


def _of_kernel(a: Array, b: Array, c: Array) -> list[Array]:
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _to_kernel(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    return [a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d]


def _of_products(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    return [a + b + c, b - c - d]


def _to_products(a: Array, b: Array) -> list[Array]:
    return [a, a + b, a - b, -b]


def _both_ways(transform: Callable[..., list[Array]], table: Table) -> list[list[Array]]:
    """A transform along the columns of a table of arrays, then along its rows."""
    down = zip(*[transform(*column) for column in zip(*table)])
    return [transform(*row) for row in down]


three_by_three_p = Primitive("three_by_three")
_compiled = jax.jit(compute, static_argnames=("of", "differentiated"), inline=True)
three_by_three_p.def_impl(_compiled)
mlir.register_lowering(three_by_three_p, mlir.lower_fun(_compiled, multiple_results=False))


@three_by_three_p.def_abstract_eval
def _abstract(a: ShapedArray, b: ShapedArray, of: str, **_: bool) -> ShapedArray:
    return a.update(shape=_shape_of(a, b, of))


def _of_first(cotangent: Array, _: object, b: Array, of: str, **how: bool) -> Array:
    if of == "kernel":  # b is y
        return three_by_three_p.bind(b, cotangent, of="x", **how)
    return three_by_three_p.bind(cotangent, b, of="x" if of == "y" else "y", **how)


def _of_second(cotangent: Array, a: Array, _: object, of: str, **how: bool) -> Array:
    if of == "kernel":
        return three_by_three_p.bind(a, cotangent, of="y", **how)
    x, y = (a, cotangent) if of == "y" else (cotangent, a)
    return three_by_three_p.bind(x, y, of="kernel", **how)


def _derivative(
    primals: tuple[Array, Array], tangents: tuple[Array, Array], of: str, **_: bool
) -> tuple[Array, Array]:
    bind = partial(three_by_three_p.bind, of=of, differentiated=True)
    (a, b), (da, db) = primals, tangents
    parts = [bind(da, b)] if not isinstance(da, ad.Zero) else []
    parts += [bind(a, db)] if not isinstance(db, ad.Zero) else []
    return bind(a, b), reduce(ad.add_tangents, parts)


ad.defbilinear(three_by_three_p, _of_first, _of_second)
ad.primitive_jvps[three_by_three_p] = _derivative


def _batched(
    arguments: Sequence[Array], axes: Sequence[int | None], **how: str | bool
) -> tuple[Array, int]:
    a, b = arguments
    if how["of"] == "kernel" or axes[1] is not None:
        return jax.vmap(partial(compute, **how), axes)(a, b), 0
    a = jnp.moveaxis(a, axes[0], 0)
    result = three_by_three_p.bind(a.reshape(-1, *a.shape[2:]), b, **how)
    return result.reshape(*a.shape[:2], *result.shape[1:]), 0


batching.primitive_batchers[three_by_three_p] = _batched
