import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_run import EMAS, Linear, batch_of

from diffusion.data import batches as pipeline
from diffusion.data.sources import Source
from diffusion.objectives.objective import Context
from diffusion.training import optimizers, parallel, validation
from diffusion.training.state import create

POINTS = batch_of(0, 21)
HELD_OUT = Source("held-out", 21, (3,), lambda i: {"x": POINTS["x"][i], "y": POINTS["y"][i]})
CHANGED = {"w": 1.0, "b": 2.0}  # what the average has and the parameters have not


def layout(devices, name="pmap"):
    return parallel.make(name, jax.devices()[:devices])


def state(devices, name="pmap"):
    made = create(Linear(), optimizers.make("sgd", 0.1), EMAS, jax.random.key(0), batch_of(0))
    average = jax.tree.map(lambda p, c: p + c, made.params, CHANGED)
    made = made.replace(ema={"constant": average, "power": made.params})
    return parallel.place(layout(devices, name), made)


@pytest.mark.parametrize(
    "count, batch_size, batches, size", [(21, 8, 3, 8), (12, 8, 2, 8), (99, 64, 1, 24)]
)
def test_it_is_the_mean_loss_with_fixed_noise(count, batch_size, batches, size):
    settings = dict(batch_size=batch_size, seed=3, layout=layout(4), average="constant")
    validate = validation.make(Linear(), HELD_OUT, count=count, **settings)
    given = state(4)
    found = validate(given, 5)
    batch_at = pipeline.batch_function(HELD_OUT, size, 3)
    key = jax.random.fold_in(jax.random.key(3), validation.KEY)

    def expected(params):
        losses = [
            Linear().loss(params, Context(), batch_at(i), jax.random.fold_in(key, i))[0]
            for i in range(batches)
        ]
        return pytest.approx(float(np.mean(losses)), rel=1e-5)

    assert found["validation_loss"] == expected(given.ema["constant"])
    assert found["validation_loss_params"] == expected(given.params)
    assert validate(given, 10) == found
    assert not given.step.is_deleted()


def test_devices_and_layouts_change_nothing():
    found = []
    for where in (layout(1), layout(4), layout(4, "fsdp")):
        settings = dict(count=16, batch_size=8, seed=0, layout=where, average="power")
        validate = validation.make(Linear(), HELD_OUT, **settings)
        found.append(validate(state(where.mesh.size, where.name), 1))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-6)


def test_frozen_parameters_averages_and_the_step_are_given():
    class Spy(Linear):
        def loss(self, params, context, batch, key):
            assert not context.train and set(batch) == {"x", "y", "index"}
            shift = jnp.sum(context.ema["constant"]["b"] - context.ema["power"]["b"])
            return context.frozen["offset"].sum() + context.step.astype(jnp.float32) + shift, {}

    validate = validation.make(
        Spy(),
        HELD_OUT,
        count=8,
        batch_size=8,
        seed=0,
        layout=layout(1),
        frozen={"offset": np.ones(3, np.float32)},
        average="power",
    )
    assert validate(state(1), 4)["validation_loss"] == 11
    assert validate(state(1), 5)["validation_loss"] == 12
