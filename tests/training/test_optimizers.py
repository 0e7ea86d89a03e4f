import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.training import optimizers


def rates(at, **settings):
    rate = optimizers.schedule(0.1, **settings)
    return np.array([rate(s) for s in at])


def test_warmup_reaches_the_rate_and_stays():
    np.testing.assert_allclose(
        rates([0, 1, 3, 4, 100], warmup=4), [0.025, 0.05, 0.1, 0.1, 0.1], rtol=1e-6
    )


def test_no_warmup_starts_at_the_rate():
    np.testing.assert_allclose(rates([0]), [0.1], rtol=1e-6)


def test_cosine():
    got = rates([10, 60, 110, 200], warmup=10, decay="cosine", steps=110)
    np.testing.assert_allclose(got, [0.1, 0.05, 0, 0], atol=1e-7)


def test_linear_after_a_hold():
    got = rates([0, 50, 75, 100], decay="linear", decay_start=50, steps=100)
    np.testing.assert_allclose(got, [0.1, 0.1, 0.05, 0], atol=1e-7)


def test_inverse_square_root():
    got = rates([0, 100, 400, 10_000], decay="rsqrt", decay_start=100)
    np.testing.assert_allclose(got, [0.1, 0.1, 0.05, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(decay="cos"), "'cos'.*cosine"),
        (dict(decay="rsqrt"), "decay_start"),
        (dict(decay="cosine"), "steps"),
        (dict(decay="linear", warmup=10, steps=10), "steps > 10"),
    ],
)
def test_impossible_schedules(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.schedule(0.1, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adamax", {}, "'adamax'.*adamw"),
        ("adam", dict(weight_decay=0.1), "adamw"),
        ("adam", dict(clip_norm=0.0), "clip_norm"),
    ],
)
def test_impossible_optimizers(name, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.make(name, 0.1, **settings)


def update(name, params, grads, **settings):
    tx, _ = optimizers.make(name, 0.1, **settings)
    updates, _ = tx.update(grads, tx.init(params), params)
    return jax.tree.map(np.asarray, updates)


PARAMS = {"kernel": jnp.eye(3, 4) * 2, "bias": jnp.ones(4)}
GRADS = {"kernel": jnp.arange(12.0).reshape(3, 4) - 4.5, "bias": jnp.array([3.0, 0.1, -4.0, 1.0])}


@pytest.mark.parametrize("name", ["adam", "adamw", "lion"])
def test_the_first_update_is_the_sign(name):
    got = update(name, PARAMS, GRADS)
    for leaf in PARAMS:
        np.testing.assert_allclose(got[leaf], -0.1 * np.sign(GRADS[leaf]), rtol=1e-5)


def test_muon_orthogonalises_matrices_only():
    got = update("muon", PARAMS, GRADS)
    ratio = got["bias"] / np.sign(GRADS["bias"])  # Adam's, with Nesterov's look ahead
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert -0.2 < ratio[0] < -0.1
    singular = np.linalg.svd(got["kernel"], compute_uv=False)[:2]  # the gradient's rank is 2
    assert singular.max() / singular.min() < 2
    assert np.linalg.svd(GRADS["kernel"], compute_uv=False)[:2].min() > 0.1


def test_clipping_scales_down_to_the_norm():
    got = update("sgd", PARAMS, GRADS, b1=0.0, clip_norm=0.5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(got)))
    assert norm == pytest.approx(0.1 * 0.5, rel=1e-5)
    small = jax.tree.map(lambda g: g * 1e-3, GRADS)
    got = update("sgd", PARAMS, small, b1=0.0, clip_norm=0.5)
    np.testing.assert_allclose(got["kernel"], -0.1 * small["kernel"], rtol=1e-6)


def test_weight_decay_spares_biases():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    got = update("adamw", PARAMS, zeros, weight_decay=0.3)
    np.testing.assert_allclose(got["kernel"], -0.1 * 0.3 * PARAMS["kernel"], rtol=1e-6)
    assert not got["bias"].any()
