"""The network for points: conditioning, dropout and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.conditioning import Conditioning
from diffusion.models.mlp import MLP

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
TIME = jnp.array([1.0, 500.0, 999.0])
LABEL = Conditioning(label=jnp.array([0, 1, 2]))


def random_params(net, *args):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *args))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


def difference(a, b):
    return float(jnp.abs(a - b).max())


def test_output_starts_at_zero_and_has_the_shape_of_x():
    out, _ = jax.jit(MLP(width=8, depth=2).init_with_output)(
        jax.random.key(0), X, TIME, Conditioning()
    )
    np.testing.assert_array_equal(out, jnp.zeros_like(X))
    wide = MLP(width=8, out_features=4)
    out, _ = jax.eval_shape(wide.init_with_output, jax.random.key(0), X, TIME, Conditioning())
    assert out.shape == (3, 4)


def test_everything_that_goes_in_matters():
    net = MLP(width=8, depth=2, num_classes=2)
    params = random_params(net, X, TIME, LABEL)
    apply = jax.jit(net.apply)
    base = apply(params, X, TIME, LABEL)
    assert params["params"]["class_embedding"]["embedding"].shape == (3, 8)
    assert difference(apply(params, X + 0.1, TIME, LABEL), base) > 1e-3
    assert difference(apply(params, X, TIME + 1, LABEL), base) > 1e-3
    null = apply(params, X, TIME, Conditioning(label=jnp.array([2, 2, 2])))
    assert difference(null[:2], base[:2]) > 1e-3 and difference(null[2], base[2]) < 1e-6
    gradient = jax.jit(jax.grad(lambda p: net.apply(p, X, TIME, LABEL).sum()))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.any(leaf != 0), path


def test_time_scale_multiplies_time():
    params = random_params(MLP(width=8), X, TIME, Conditioning())
    scaled = jax.jit(MLP(width=8, time_scale=4.0).apply)(params, X, TIME, Conditioning())
    plain = jax.jit(MLP(width=8).apply)(params, X, 4 * TIME, Conditioning())
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


def test_examples_do_not_see_each_other():
    net = MLP(width=8, depth=2)
    params = random_params(net, X, TIME, Conditioning())
    apply = jax.jit(net.apply)
    base = apply(params, X, TIME, Conditioning())
    moved = apply(params, X.at[0].add(1.0), TIME, Conditioning())
    assert difference(moved[0], base[0]) > 1e-3
    np.testing.assert_array_equal(moved[1:], base[1:])


def test_dropout_only_when_training():
    net = MLP(width=8, depth=2, dropout=0.5)
    params = random_params(net, X, TIME, Conditioning())

    @jax.jit
    def train(key):
        return net.apply(params, X, TIME, Conditioning(), True, rngs={"dropout": key})

    assert difference(train(jax.random.key(0)), train(jax.random.key(1))) > 1e-3
    without = MLP(width=8, depth=2)
    np.testing.assert_array_equal(
        jax.jit(net.apply)(params, X, TIME, Conditioning()),
        jax.jit(without.apply)(params, X, TIME, Conditioning()),
    )


def test_bfloat16_is_close_to_float32():
    params = random_params(MLP(width=16), X, TIME, Conditioning())
    full = jax.jit(MLP(width=16).apply)(params, X, TIME, Conditioning())
    half = jax.jit(MLP(width=16, dtype=jnp.bfloat16).apply)(params, X, TIME, Conditioning())
    assert half.dtype == jnp.float32
    assert 0 < difference(half, full) < 0.05 * float(jnp.abs(full).max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 7}, "width=7; expected an even number"),
        ({"depth": 0}, "depth=0; expected at least 1"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"dropout": 1.0}, "dropout=1.0; expected a rate"),
    ],
)
def test_fields_are_checked_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        MLP(**fields)


def test_inputs_are_checked():
    with pytest.raises(ValueError, match=r"cond\.label is None"):
        MLP(num_classes=2).init(jax.random.key(0), X, TIME, Conditioning())
    with pytest.raises(ValueError, match=r"expected \[B, D\] and \[B\]"):
        MLP().init(jax.random.key(0), X, TIME[:2], Conditioning())
