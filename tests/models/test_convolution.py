"""Convolutions with fewer products against the plain ones, values and derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import convolution
from diffusion.models.convolution import (
    by_patches,
    by_tiles,
    direct,
    of_doubled,
    three_by_three,
)
from diffusion.models.unet_blocks import Upsample, nearest_upsample


@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (1, 1, 2, 3)])
def test_convolution_of_the_doubled_image(shape):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=shape))
        cotangent = jnp.asarray(rng.normal(size=(shape[0], 2 * shape[1], 2 * shape[2], 4)))
        folded = nn.Conv(4, (3, 3), conv_general_dilated=of_doubled, param_dtype=x.dtype)
        plain = nn.Conv(4, (3, 3), param_dtype=x.dtype)
        params = {"kernel": rng.normal(size=(3, 3, 3, 4)), "bias": rng.normal(size=4)}

        @jax.jit
        def both(params, x):
            results = []
            for function in (
                lambda p, x: folded.apply({"params": p}, x),
                lambda p, x: plain.apply({"params": p}, nearest_upsample(x)),
            ):
                y, back = jax.vjp(function, params, x)
                results.append((y, back(cotangent)))
            return results

        ours, expected = both(params, x)
        assert ours[0].dtype == jnp.float64
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, expected)


def test_upsampling_is_the_same_on_every_device(monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 9, 4)), jnp.float32)
    assert convolution.doubling_pays(x) and not convolution.doubling_pays(x[:, :7])
    layer = Upsample()
    variables = layer.init(jax.random.key(0), x)
    here = layer.apply(variables, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = layer.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, there)  # names, too
    np.testing.assert_allclose(here, layer.apply(variables, x), atol=1e-5)


def plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=convolution.LAYOUT
    )


@pytest.mark.parametrize("form", [by_tiles, by_patches])
@pytest.mark.parametrize("height, width", [(6, 4), (5, 7), (1, 1), (2, 3)])
def test_values_and_derivatives_are_those_of_the_plain_convolution(form, height, width):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(2, height, width, 3)))
        kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)))
        given, directions = (x, kernel), (jnp.sin(x), jnp.cos(kernel))
        cotangent = jnp.asarray(rng.normal(size=(2, height, width, 4)))

        @jax.jit
        def both():
            results = []
            for function in (form, plain):
                y, back = jax.vjp(function, *given)
                results.append((y, back(cotangent), jax.jvp(function, given, directions)[1]))
            return results

        ours, expected = both()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, expected)


def products(shape, features, padding="SAME", **settings):
    """How many matrix products and convolutions a layer is traced to."""
    layer = nn.Conv(
        features, (3, 3), padding=padding, conv_general_dilated=three_by_three, **settings
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    text = str(jax.make_jaxpr(layer.apply)(params, x))
    return text.count("dot_general["), text.count("conv_general_dilated[")


@pytest.mark.parametrize("settings", [{}, {"padding": ((1, 1), (1, 1))}])
def test_large_images_of_many_channels_go_by_tiles(settings):
    assert products((1, 64, 64, 64), 128, **settings) == (16, 0)
    with direct():
        assert products((1, 64, 64, 64), 128, **settings) == (0, 1)


@pytest.mark.parametrize("shape", [(2, 4, 8, 64), (100, 2, 5, 64)])
def test_small_images_are_one_product(shape):
    assert products(shape, 64) == (1, 0)
    with direct():
        assert products(shape, 64) == (0, 1)


@pytest.mark.parametrize(
    "shape, features, settings",
    [
        ((1, 64, 64, 32), 64, {}),
        ((2, 4, 8, 32), 64, {}),
        ((2, 8, 8, 64), 64, {}),
        ((1, 64, 64, 64), 4, {}),
        ((1, 32, 32, 64), 64, {}),  # too few tiles
        ((1, 64, 64, 64), 640, {}),  # too few for so many channels
        ((4, 1024, 1024, 64), 64, {}),  # more memory than it may take
        ((1, 64, 64, 64), 128, {"strides": 2}),
        ((1, 64, 64, 64), 128, {"padding": ((0, 1), (0, 1))}),
        ((1, 64, 64, 64), 128, {"kernel_dilation": 2}),
        ((1, 64, 64, 128), 128, {"feature_group_count": 2}),
        ((1, 64, 64, 64), 128, {"dtype": jnp.bfloat16}),
    ],
)
def test_all_others_are_plain(shape, features, settings):
    assert products(shape, features, **settings) == (0, 1)


@pytest.mark.parametrize("height", [2, 45])
def test_a_layer_gives_the_same_either_way(height):
    layer = nn.Conv(64, (3, 3), conv_general_dilated=three_by_three)
    x = jax.random.normal(jax.random.key(0), (1, height, 47, 64))
    params = layer.init(jax.random.key(1), x)
    with direct():
        expected = layer.apply(params, x)
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=2e-5)
