from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_run import EMAS, Linear, assert_identical, batch_of

from diffusion.objectives.objective import Context
from diffusion.training import optimizers, parallel
from diffusion.training.parallel import split
from diffusion.training.state import create
from diffusion.training.step import make_train_step

SGD = optimizers.make("sgd", 0.1, b1=0.0)
ADAM = optimizers.make("adam", 0.01, warmup=10)
KEY = jax.random.key(1)


@cache
def step_of(devices, accumulate, optimizer):
    devices = jax.devices()[:devices]
    return make_train_step(Linear(), optimizer, EMAS, accumulate=accumulate, devices=devices)


def trained(devices=1, accumulate=1, steps=3, optimizer=SGD, batch=batch_of, frozen=None):
    step = step_of(devices, accumulate, optimizer)
    state = create(Linear(), optimizer, EMAS, jax.random.key(0), batch(0))
    state = parallel.place(parallel.make(devices=jax.devices()[:devices]), state)
    for i in range(steps):
        state, metrics = step(state, frozen, batch(i), KEY)
    return state, metrics


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_one_sgd_step_is_the_gradient_of_the_whole_batch():
    start = create(Linear(), SGD, EMAS, jax.random.key(0), batch_of(0))
    grads = jax.grad(
        lambda p: Linear().loss(p, Context(), batch_of(0), jax.random.fold_in(KEY, 0))[0]
    )(start.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start.params, grads)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    for settings in (dict(), dict(devices=4), dict(devices=4, accumulate=2)):
        state, metrics = trained(steps=1, **settings)
        assert_close(state.params, expected)
        assert_close(state.ema["power"], expected)  # the first update is all there is to average
        assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)


def test_four_devices_train_as_one():
    one, four = trained(devices=1), trained(devices=4)
    assert_close(one[0], four[0])
    assert_close(one[1], four[1])
    assert all(len(x.sharding.device_set) == 4 for x in jax.tree.leaves(four[0]))


def test_accumulation_changes_nothing_but_memory():
    whole, pieces = trained(), trained(devices=4, accumulate=2)
    assert_close(whole[0], pieces[0])
    assert_close(whole[1], pieces[1])


@pytest.mark.parametrize("devices", [1, 4])
def test_the_state_is_donated_and_keeps_its_shape(devices):
    first, _ = trained(devices, steps=1)
    shapes = jax.tree.map(jnp.shape, first)
    second, _ = step_of(devices, 1, SGD)(first, None, batch_of(1), KEY)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    assert jax.tree.map(jnp.shape, second) == shapes
    expected = {"step": (), "w": (3, 2), "b": (2,)}
    assert {"step": second.step.shape, **jax.tree.map(jnp.shape, second.params)} == expected


def test_the_step_is_compiled_once():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    optimizer = optimizers.make("sgd", 0.1, b1=0.5)  # its own, so that nothing is cached
    state, _ = trained(4, steps=1, optimizer=optimizer)
    assert compiled
    compiled.clear()
    for i in range(2):
        state, _ = step_of(4, 1, optimizer)(state, None, batch_of(i), KEY)
    assert not compiled


def test_keys_follow_the_step():
    def loss(step):  # of the same parameters and data
        state = create(Linear(), SGD, EMAS, jax.random.key(0), batch_of(0))
        layout = parallel.make(devices=jax.devices()[:1])
        state = parallel.place(layout, state.replace(step=jnp.int32(step)))
        return float(step_of(1, 1, SGD)(state, None, batch_of(0), KEY)[1]["loss"])

    assert len({loss(0), loss(1), loss(2)}) == 3
    assert loss(2) == loss(2)


def test_frozen_parameters_are_arguments():
    shifted, _ = trained(steps=1, frozen={"offset": jnp.ones(2)})
    plain, _ = trained(steps=1)
    assert np.abs(shifted.params["b"] - plain.params["b"]).min() > 0.05


def test_a_step_that_is_not_finite_changes_nothing_but_the_step():
    def poisoned(step):
        batch = batch_of(step)
        if step == 2:
            batch["x"][5] = np.nan  # one example, on one device
        return batch

    before, fine = trained(4, steps=2, optimizer=ADAM, batch=poisoned)
    after, metrics = trained(4, steps=3, optimizer=ADAM, batch=poisoned)
    assert float(fine["finite"]) == 1
    assert float(metrics["finite"]) == 0
    assert_identical(before.replace(step=3), after)


def test_metrics():
    state, metrics = trained(4, optimizer=ADAM)
    expected = {"loss", "mae", "gradient_norm", "parameter_norm", "learning_rate", "finite"}
    assert metrics.keys() == expected
    assert float(metrics["learning_rate"]) == pytest.approx(0.003)  # the third step's
    norm = np.sqrt(sum(np.sum(np.square(p)) for p in jax.tree.leaves(state.params)))
    assert float(metrics["parameter_norm"]) == pytest.approx(norm, rel=1e-5)


def test_batch_that_cannot_be_divided():
    with pytest.raises(ValueError, match=r"'x'.*10 examples.*4 pieces.*8, 12"):
        split(batch_of(0, size=10), 4)
    with pytest.raises(ValueError, match=r"8 examples.*3 pieces"):
        trained(accumulate=3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_train_step(Linear(), SGD, EMAS, accumulate=0)
