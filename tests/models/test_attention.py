"""Attention against its formula, and what the U-Net's attention layers may and may not see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.attention import (
    FeedForward,
    SpatialAttention,
    SpatialTransformer,
    TransformerBlock,
)
from diffusion.models.kernels.attention import attend, attend_by_products, attend_in_blocks


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(module, *args):
    """Parameters drawn without running the module; none is zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0, impl="unsafe_rbg"), *args))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


def reference(q, k, v, mask=None):
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_attention(masked):
    q, k, v = normal(2, 5, 3, 4), normal(2, 7, 3, 4, seed=1), normal(2, 7, 3, 4, seed=2)
    mask = jnp.arange(7)[None] < jnp.array([[4], [7]]) if masked else None
    expected = reference(*(np.asarray(a, np.float64) for a in (q, k, v)), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_forms_for_a_cpu_give_the_same_attention_and_gradient(masked):
    q, k, v = normal(2, 5, 3, 4), normal(2, 7, 3, 4, seed=1), normal(2, 7, 3, 4, seed=2)
    mask = jnp.arange(7)[None] < jnp.array([[4], [7]]) if masked else None

    def both(function):
        total = lambda q, k, v: (function(q, k, v, mask) * normal(2, 5, 3, 4, seed=3)).sum()
        return function(q, k, v, mask), jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

    blocks = partial(attend_in_blocks, entries=14)  # two queries in each of three blocks
    plain = both(partial(attend, implementation="xla"))
    for function in (blocks, attend_by_products):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), both(function), plain)


def test_large_maps_are_taken_in_blocks_on_a_cpu():
    def jaxpr(length, implementation=None):
        q = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.bfloat16)
        function = partial(attend, implementation=implementation)
        assert jax.eval_shape(function, q, q, q) == q
        return str(jax.make_jaxpr(function)(q, q, q))

    assert "scan" in jaxpr(512)
    assert "scan" not in jaxpr(256) + jaxpr(512, "xla")
    q, k, v = (normal(1, 600, 1, 4, seed=i).astype(jnp.bfloat16) for i in range(3))
    out = attend(q, k, v).astype(jnp.float32)
    exact = reference(*(np.asarray(a, np.float64) for a in (q, k, v)))
    np.testing.assert_allclose(out, exact, atol=0.02)


def test_attend_softmax_is_float32_for_bfloat16_inputs():
    q, k, v = normal(1, 4, 2, 8), normal(1, 300, 2, 8, seed=1), normal(1, 300, 2, 8, seed=2)
    q, k, v = (a.astype(jnp.bfloat16) for a in (4 * q, k, v))
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = reference(*(np.asarray(a, np.float64) for a in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02)


def test_attend_rejects_a_mask_of_another_length():
    q, k = normal(2, 5, 1, 4), normal(2, 7, 1, 4)
    with pytest.raises(ValueError, match=r"\(2, 5\); expected one bool per key, \(2, 7\)"):
        attend(q, k, k, jnp.ones((2, 5), bool))


def test_feed_forward_is_geglu_with_the_exact_gelu():
    x, module = normal(2, 3, 4), FeedForward()
    p = random_params(module, x)["params"]
    h = x @ p["net_0"]["proj"]["kernel"] + p["net_0"]["proj"]["bias"]
    value, gate = h[..., :16], h[..., 16:]
    exact = value * gate * 0.5 * (1 + jax.lax.erf(gate / np.sqrt(2)))
    expected = exact @ p["net_2"]["kernel"] + p["net_2"]["bias"]
    np.testing.assert_allclose(module.apply({"params": p}, x), expected, atol=1e-5)


@pytest.mark.parametrize("only_cross", [False, True])
def test_only_cross_attention_keeps_pixels_apart(only_cross):
    x, context = normal(1, 6, 8), normal(1, 3, 5, seed=1)
    block = TransformerBlock(2, only_cross_attention=only_cross)
    params = random_params(block, x, context)
    apply = jax.jit(block.apply)
    change = apply(params, x.at[0, 0].multiply(-1), context) - apply(params, x, context)
    assert jnp.abs(change[0, 0]).max() > 1e-3
    assert (jnp.abs(change[0, 1:]).max() > 1e-4) != only_cross


def test_transformer_ignores_masked_tokens_and_only_those():
    x, context = normal(2, 2, 2, 8), normal(2, 5, 6, seed=1)
    mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
    module = SpatialTransformer(2, groups=4)
    params = random_params(module, x, context)
    apply = jax.jit(module.apply)
    base = apply(params, x, context, mask)
    moved = apply(params, x, context.at[:, 3:].add(1.0), mask)
    np.testing.assert_array_equal(moved[0], base[0])
    assert jnp.abs(moved[1] - base[1]).max() > 1e-4
    shorter = apply(params, x[:1], context[:1, :3])
    np.testing.assert_allclose(base[:1], shorter, atol=1e-5)


def test_linear_and_convolutional_projections_are_the_same_function():
    x, context = normal(2, 2, 2, 8), normal(2, 3, 6, seed=1)
    conv, linear = SpatialTransformer(2, groups=4), SpatialTransformer(2, 1, True, groups=4)
    params = random_params(conv, x, context)
    squeezed = {**params["params"]}
    for name in ("proj_in", "proj_out"):
        kernel = params["params"][name]["kernel"]
        assert kernel.shape == (1, 1, 8, 8)
        squeezed[name] = {**squeezed[name], "kernel": kernel[0, 0]}
    np.testing.assert_allclose(
        jax.jit(linear.apply)({"params": squeezed}, x, context),
        jax.jit(conv.apply)(params, x, context),
        atol=1e-5,
    )


def test_new_layers_are_the_identity():
    x, context = normal(1, 2, 2, 8), normal(1, 3, 6, seed=1)
    for module in (SpatialAttention(2, groups=4), SpatialTransformer(2, groups=4)):
        out, _ = jax.jit(module.init_with_output)(jax.random.key(0, impl="unsafe_rbg"), x, context)
        np.testing.assert_array_equal(out, x)


def test_spatial_attention_commutes_with_moving_pixels():
    x, module = normal(1, 2, 4, 8), SpatialAttention(2, groups=4)
    params = random_params(module, x)
    apply = jax.jit(module.apply)
    out = apply(params, x)
    np.testing.assert_allclose(apply(params, x[:, ::-1]), out[:, ::-1], atol=1e-5)
    assert jnp.abs(apply(params, x.at[0, 0, 0].multiply(-1)) - out)[0, 1].max() > 1e-4
