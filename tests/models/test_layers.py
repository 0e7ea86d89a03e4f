"""Shared layers against Flax's own and against their formulas."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.layers import EmbeddingMLP, GroupNorm, LayerNorm, Pointwise, sinusoidal


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_sinusoidal_conventions():
    t = jnp.array([0.0, 3.0, 999.0])
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    angles = np.asarray(t)[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    np.testing.assert_allclose(sinusoidal(t, 8), expected, atol=1e-4)
    frequencies = 10_000.0 ** -(np.arange(4) / 3)  # with the shift the slowest is exactly 1/10,000
    angles = np.asarray(t)[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    np.testing.assert_allclose(
        sinusoidal(t, 8, cos_first=False, freq_shift=1.0), expected, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(3, 4, 6, 12), (3, 5, 12), (3, 12)])
def test_group_norm_is_flax_group_norm(shape):
    x = 3 * normal(*shape) + 2
    params = {"params": {"scale": normal(12, seed=1), "bias": normal(12, seed=2)}}
    expected = nn.GroupNorm(4, epsilon=1e-5).apply(params, x)
    np.testing.assert_allclose(GroupNorm(4).apply(params, x), expected, atol=1e-5)


def test_group_norm_statistics_are_float32():
    x = (normal(1, 64, 64, 4) + 30).astype(jnp.bfloat16)  # in bfloat16, the sum would stall
    module = GroupNorm(2, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)
    out = module.apply(params, x)
    assert out.dtype == jnp.bfloat16
    assert params["params"]["scale"].dtype == jnp.float32
    groups = out.astype(jnp.float32).reshape(-1, 2, 2)
    np.testing.assert_allclose(groups.mean((0, 2)), 0, atol=1e-2)
    np.testing.assert_allclose(groups.std((0, 2)), 1, atol=1e-2)


def test_group_norm_names_a_group_count_that_divides():
    with pytest.raises(ValueError, match="12 channels cannot be split into 8 groups; 4 would do"):
        GroupNorm(8).init(jax.random.key(0), normal(1, 12))


def test_pointwise_is_a_1x1_convolution():
    x = normal(2, 3, 4, 5)
    params = {"params": {"kernel": normal(1, 1, 5, 7, seed=1), "bias": normal(7, seed=2)}}
    expected = nn.Conv(7, (1, 1)).apply(params, x)
    np.testing.assert_allclose(Pointwise(7).apply(params, x), expected, atol=1e-5)


def test_a_second_input_of_an_embedding_starts_without_effect():
    x, second, module = normal(2, 6), normal(2, 4, seed=1), EmbeddingMLP(8)
    params = module.init(jax.random.key(0), x, second)
    assert params["params"]["cond_proj"].keys() == {"kernel"}
    np.testing.assert_array_equal(module.apply(params, x, second), module.apply(params, x))
    params["params"]["cond_proj"]["kernel"] = jnp.ones((4, 6))
    assert jnp.abs(module.apply(params, x, second) - module.apply(params, x)).max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 4, 6, 12), (1, 5, 5, 12), (1, 8, 12)])
@pytest.mark.parametrize(
    "norms", [(GroupNorm(4), nn.GroupNorm(4, epsilon=1e-5)), (LayerNorm(), nn.LayerNorm())]
)
def test_norms_of_one_example_have_the_gradients_of_flax(norms, shape):
    x, weights = 3 * normal(*shape) + 2, normal(*shape, seed=3)
    params = {"params": {"scale": normal(12, seed=1), "bias": normal(12, seed=2)}}

    def gradients(module):
        return jax.grad(lambda p, x: (weights * module.apply(p, x)).sum(), (0, 1))(params, x)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *map(gradients, norms))
    ours, theirs = (
        jax.jvp(jax.vmap(partial(module.apply, params)), (x[None],), (weights[None],))[1]
        for module in norms
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
