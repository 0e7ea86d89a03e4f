from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_run import EMAS, assert_identical
from processes_run import SGD, WIDTH, Regression, batch_of, run

from diffusion.objectives.objective import Context
from diffusion.runs.restore import restore_ema
from diffusion.training import loop, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

KEY = jax.random.key(1)


@cache
def step_of(layout, accumulate):
    return make_train_step(Regression(), SGD, EMAS, accumulate=accumulate, parallel=layout)


@cache
def layout_of(name):
    return parallel.make(name)


def initial(name):
    return parallel.initialise(
        layout_of(name),
        lambda key: create(Regression(), SGD, EMAS, key, batch_of(0)),
        jax.random.key(0),
    )


def trained(name, accumulate=1, steps=3):
    layout, state = layout_of(name), initial(name)
    for i in range(steps):
        batch = parallel.place_batch(layout, batch_of(i))
        state, metrics = step_of(name, accumulate)(state, None, batch, KEY)
    return state, metrics


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def kernel(tree):
    return tree["Dense_0"]["kernel"]


def test_one_sgd_step_is_the_gradient_of_the_whole_batch():
    start = create(Regression(), SGD, EMAS, jax.random.key(0), batch_of(0))
    grads, _ = jax.grad(Regression().loss, has_aux=True)(
        start.params, Context(), batch_of(0), jax.random.fold_in(KEY, 0)
    )
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, start.params, grads)
    for accumulate in (1, 2):
        state, _ = trained("fsdp", accumulate, steps=1)
        assert_close(state.params, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_layouts_train_alike(accumulate):
    (state, metrics), (other, others) = trained("pmap"), trained("fsdp", accumulate)
    assert_close(state, other)
    assert_close(metrics, others)


def test_the_state_is_cut_and_stays_so():
    first = initial("fsdp")
    for state in (first, trained("fsdp")[0]):
        for tree in (state.params, state.ema["power"], state.opt_state[0].trace):
            shards = kernel(tree).addressable_shards
            assert {shard.data.shape for shard in shards} == {(WIDTH, WIDTH // 4)}
            assert len({shard.device for shard in shards}) == 4
        assert state.params["Dense_0"]["bias"].sharding.is_fully_replicated  # it is small
    step_of("fsdp", 1)(first, None, batch_of(0), KEY)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))


@cache
def compiled(name, accumulate):
    batch = parallel.place_batch(layout_of(name), batch_of(0))
    return step_of(name, accumulate).lower(initial(name), None, batch, KEY).compile()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_gathers_parameters_and_moves_no_examples(accumulate):
    text = compiled("fsdp", accumulate).as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert any(f"f32[{WIDTH},{WIDTH}]" in line for line in gathered)
    assert not any(f"f32[{8 // accumulate},{WIDTH}]" in line for line in gathered)  # activations
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@pytest.mark.parametrize(("name", "devices"), [("pmap", 1), ("fsdp", 4)])
def test_memory_is_what_the_plan_says(name, devices):
    expected = parallel.bytes_per_device(initial(name), devices)
    expected += sum(x.nbytes for x in batch_of(0).values()) // 4 + 8  # and the key
    assert compiled(name, 1).memory_analysis().argument_size_in_bytes == expected


def test_the_step_is_compiled_once():
    trained("fsdp", steps=1)
    told = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: told.append(event) if "backend_compile" in event else None
    )
    layout, state = layout_of("fsdp"), initial("fsdp")
    told.clear()  # of the initialisation
    for i in range(3):
        batch = parallel.place_batch(layout, batch_of(i))
        state, _ = step_of("fsdp", 1)(state, None, batch, KEY)
    assert not told


def test_a_run_goes_on_in_the_other_layout(tmp_path, monkeypatch):
    make = {"pmap": step_of("pmap", 1), "fsdp": step_of("fsdp", 1)}
    monkeypatch.setattr(loop, "make_train_step", lambda *_, parallel, **__: make[parallel])
    whole, workdir = run(tmp_path / "whole", "pmap", steps=6), tmp_path / "changing"
    for steps, name in ((2, "pmap"), (4, "fsdp"), (6, "pmap")):
        state = run(workdir, name, steps=steps)
        assert kernel(state.params).sharding.is_fully_replicated == (name == "pmap")
    assert_close(state, whole)
    assert_identical(restore_ema(workdir, "power")[0], state.ema["power"])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), ()),
        ((5000,), ()),  # small
        ((128, 128), (None, "data")),
        ((512, 128), ("data",)),
        ((127, 516), (None, "data")),
        ((129, 513), ()),  # 4 divides neither
        ((3, 3, 64, 96), (None, None, None, "data")),
        ((28, 64, 64), (None, None, "data")),
    ],
)
def test_where_a_leaf_is_cut(shape, expected):
    assert parallel.spec(shape, 4) == jax.sharding.PartitionSpec(*expected)


def test_keys_can_be_placed():
    key = parallel.place(layout_of("fsdp"), jax.random.key(3))
    assert len(key.sharding.device_set) == 4
    assert jnp.array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(3)))


def test_impossible_settings(tmp_path):
    with pytest.raises(ValueError, match=r"'zero'.*pmap, fsdp"):
        parallel.make("zero")
    with pytest.raises(ValueError, match=r"10 examples, which 4 pieces.*8, 12"):
        parallel.place_batch(layout_of("fsdp"), batch_of(0, size=10))
    with pytest.raises(ValueError, match=r"8 examples.*12 pieces.*: 12"):
        trained("fsdp", accumulate=3)
