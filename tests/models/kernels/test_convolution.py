"""Convolutions with fewer products against the plain ones, values and derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.kernels import convolution
from diffusion.models.kernels.convolution import direct, of_doubled, three_by_three
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


def forms(shape, features, padding="SAME", **settings):
    """How many products, plain convolutions and convolutions by tiles a layer is traced to."""
    layer = nn.Conv(
        features, (3, 3), padding=padding, conv_general_dilated=three_by_three, **settings
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    traced = jax.make_jaxpr(layer.apply)(params, x)
    names = [equation.primitive.name for equation in traced.eqns]
    return [names.count(name) for name in ("dot_general", "conv_general_dilated", "three_by_three")]


@pytest.mark.parametrize(
    "shape, features, settings",
    [
        ((1, 64, 64, 64), 128, {}),
        ((1, 64, 64, 64), 128, {"padding": ((1, 1), (1, 1))}),
        ((64, 8, 8, 96), 32, {}),
        ((64, 4, 4, 96), 64, {}),
        ((1, 32, 32, 640), 640, {}),
    ],
)
def test_many_tiles_of_many_channels(shape, features, settings):
    assert forms(shape, features, **settings) == [0, 0, 1]
    with direct():
        assert forms(shape, features, **settings) == [0, 1, 0]


def test_the_environment_can_ask_for_direct_convolutions(monkeypatch):
    monkeypatch.setenv("DIFFUSION_CONVOLUTIONS", "direct")
    assert forms((1, 64, 64, 64), 128) == [0, 1, 0]
    assert not convolution.doubling_pays(jnp.zeros((1, 16, 16, 4)))
    monkeypatch.setenv("DIFFUSION_CONVOLUTIONS", "drect")
    with pytest.raises(ValueError, match="'drect' in the environment; expected fastest or direct"):
        forms((1, 64, 64, 64), 128)


@pytest.mark.parametrize("shape", [(2, 4, 8, 64), (100, 2, 5, 64)])
def test_small_images_are_one_product(shape):
    assert forms(shape, 64) == [1, 0, 0]
    with direct():
        assert forms(shape, 64) == [0, 1, 0]


@pytest.mark.parametrize(
    "shape, features, settings",
    [
        ((64, 8, 8, 32), 32, {}),  # too few channels
        ((2, 4, 8, 32), 64, {}),
        ((1, 64, 64, 64), 4, {}),
        ((64, 4, 4, 64), 64, {}),  # too few tiles for so few channels
        ((2, 8, 8, 64), 64, {}),  # too few tiles
        ((1, 16, 16, 1280), 1280, {}),  # too few for so many channels
        ((4, 1024, 1024, 64), 64, {}),  # more memory than it may take
        ((1, 64, 64, 64), 128, {"strides": 2}),
        ((1, 64, 64, 64), 128, {"padding": ((0, 1), (0, 1))}),
        ((1, 64, 64, 64), 128, {"kernel_dilation": 2}),
        ((1, 64, 64, 128), 128, {"feature_group_count": 2}),
        ((1, 64, 64, 64), 128, {"dtype": jnp.bfloat16}),
    ],
)
def test_all_others_are_plain(shape, features, settings):
    assert forms(shape, features, **settings) == [0, 1, 0]


@pytest.mark.parametrize("height", [2, 45])
def test_a_layer_gives_the_same_either_way(height):
    layer = nn.Conv(64, (3, 3), conv_general_dilated=three_by_three)
    x = jax.random.normal(jax.random.key(0), (1, height, 47, 64))
    params = layer.init(jax.random.key(1), x)
    with direct():
        expected = layer.apply(params, x)
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=2e-5)
