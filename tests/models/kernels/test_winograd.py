"""Winograd's convolutions, and products of patches, against plain ones: values and derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.models.kernels import winograd
from diffusion.models.kernels.convolution import by_patches
from diffusion.training import flops

SIZES = pytest.mark.parametrize("height, width", [(6, 4), (5, 7), (1, 1), (2, 3)])
equal = partial(jax.tree.map, partial(np.testing.assert_allclose, atol=1e-11))


def plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=winograd.LAYOUT
    )


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.fixture(params=[0, 1e9], ids=["by tiles", "directly"])
def how(request, monkeypatch):
    """How derivatives are taken."""
    monkeypatch.setattr(winograd, "DERIVATIVES_PAY", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("form", [winograd.convolve, by_patches])
@SIZES
def test_values_and_derivatives_are_those_of_the_plain_convolution(form, height, width, how):
    with jax.enable_x64(True):
        x, kernel = normal(2, height, width, 3), normal(3, 3, 3, 4)
        given, directions = (x, kernel), (jnp.sin(x), jnp.cos(kernel))
        cotangent = normal(2, height, width, 4, seed=1)

        @partial(jax.jit, static_argnums=0)
        def everything(function):
            y, back = jax.vjp(function, *given)
            return y, back(cotangent), jax.jvp(function, given, directions)[1]

        equal(everything(form), everything(plain))


def test_derivatives_of_second_order(how):
    with jax.enable_x64(True):
        given = normal(2, 5, 4, 3), normal(3, 3, 3, 4)
        directions = jax.tree.map(jnp.cos, given)

        def total(function, x, kernel):
            return jnp.sin(function(x, kernel)).sum()

        @partial(jax.jit, static_argnums=0)
        def everything(function):
            gradient = jax.grad(partial(total, function), (0, 1))
            forward = jax.jvp(gradient, given, directions)[1]
            norm = lambda x, kernel: sum((g**2).sum() for g in gradient(x, kernel))
            return forward, jax.grad(norm, (0, 1))(*given)

        equal(everything(winograd.convolve), everything(plain))


@pytest.mark.parametrize("of", ["y", "x", "kernel"])
@pytest.mark.parametrize("differentiated", [False, True])
@SIZES
def test_the_primitive_is_one_trilinear_form(of, differentiated, height, width):
    with jax.enable_x64(True):
        x, y = normal(2, height, width, 3), normal(2, height, width, 4, seed=1)
        kernel = normal(3, 3, 3, 4, seed=2)
        operands, result = {
            "y": ((x, kernel), y),
            "x": ((y, kernel), x),
            "kernel": ((x, y), kernel),
        }[of]
        function = partial(winograd.three_by_three_p.bind, of=of, differentiated=differentiated)
        shape = jax.eval_shape(function, *operands)
        assert (shape.shape, shape.dtype) == (result.shape, result.dtype)
        number = (y * plain(x, kernel)).sum()
        np.testing.assert_allclose((function(*operands) * result).sum(), number, rtol=1e-10)
        back = jax.vjp(function, *operands)[1](result)
        for operand, cotangent in zip(operands, back):
            np.testing.assert_allclose((operand * cotangent).sum(), number, rtol=1e-10)
        transposed = jax.linear_transpose(lambda a: function(a, operands[1]), operands[0])
        np.testing.assert_allclose((transposed(result)[0] * operands[0]).sum(), number, rtol=1e-10)


@pytest.mark.parametrize("axes", [(0, None), (1, None), (None, 0), (0, 0)])
def test_batches_of_either_operand(axes):
    with jax.enable_x64(True):
        x, kernel = normal(2, 5, 4, 3), normal(3, 3, 3, 4)
        x, kernel = (
            a if axis is None else jnp.stack([a, jnp.sin(a)], axis=axis)
            for a, axis in zip((x, kernel), axes)
        )

        def everything(function):
            y, back = jax.vjp(jax.vmap(function, axes), x, kernel)
            of_each = jax.grad(lambda x, kernel: (function(x, kernel) ** 2).sum(), (0, 1))
            return y, back(y), jax.vmap(of_each, axes)(x, kernel)

        equal(everything(winograd.convolve), everything(plain))


def test_one_device_of_several_computes_its_part():
    x, kernel = normal(4, 1, 5, 4, 3).astype(jnp.float32), normal(3, 3, 3, 4).astype(jnp.float32)
    gradient = jax.grad(lambda kernel, x: (winograd.convolve(x, kernel) ** 2).sum())
    parts = jax.pmap(gradient, in_axes=(None, 0), devices=jax.devices()[:4])(kernel, x)
    expected = gradient(kernel, x[:, 0])
    np.testing.assert_allclose(parts.sum(0), expected, rtol=1e-4, atol=1e-4)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x = jax.device_put(x[:, 0], NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(jax.jit(gradient)(kernel, x), expected, rtol=1e-4, atol=1e-4)


def test_what_it_saves_is_counted():
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 8, 8, 64), (3, 3, 64, 128)))
    assert flops.count(plain, x, kernel) == 2 * 64 * 64 * 128 * 9
    assert flops.count(winograd.convolve, x, kernel) == 2 * 16 * 64 * 128 * 16
