"""The folded convolution against the plain one, values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.convolution import of_doubled
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
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 4)), jnp.float32)
    layer = Upsample()
    variables = layer.init(jax.random.key(0), x)
    here = layer.apply(variables, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = layer.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, there)  # names, too
    np.testing.assert_allclose(here, layer.apply(variables, x), atol=1e-5)
