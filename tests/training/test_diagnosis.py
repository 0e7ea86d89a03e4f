from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from linear_run import Linear, batch_of

from diffusion.training import diagnosis

KEY = jax.random.key(0)
STEP_KEY = jax.random.key_data(jax.random.fold_in(KEY, 3)).tolist()
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}


class Rooted(Linear):
    """Its loss is finite at zero error, where its gradient is not."""

    def loss(self, params, context, batch, key):
        error = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return jnp.sqrt(jnp.sum(error**2, -1)).mean(), {}

    def levels(self, key, index):
        assert jax.random.key_data(key).tolist() == STEP_KEY
        t = (index + 1) / 10
        return SimpleNamespace(t=t, alpha=1 - t, sigma=t)


def examined(objective, batch, params=PARAMS):
    return diagnosis.examine(objective, params, None, {}, batch, KEY, 3)


def test_data_that_are_not_finite_are_named():
    batch = batch_of(0)
    batch["x"][5, 1] = np.inf
    (line,) = examined(Linear(), batch)
    assert line.startswith("example 5 of the batch")
    assert line.endswith("its data are not finite (x)")


def test_gradients_that_are_not_finite_are_named_with_their_levels():
    batch = batch_of(0)
    batch["x"][2], batch["y"][2] = 0.0, 0.0
    (line,) = examined(Rooted(), batch)
    assert line == "example 2 of the batch: t 0.3, sigma/alpha 0.4286, loss 0, gradient_norm nan"


def test_five_are_named_and_the_rest_counted():
    batch = batch_of(0, size=9)
    batch["y"][1:] = np.nan
    lines = examined(Linear(), batch)
    assert [line.split()[1] for line in lines[:-1]] == ["1", "2", "3", "4", "5"]
    assert lines[-1] == "and 3 more of 9 examples"


def test_parameters_are_to_blame():
    (line,) = examined(
        Linear(), batch_of(0), {"w": jnp.ones((3, 2)).at[0, 0].set(jnp.nan), "b": PARAMS["b"]}
    )
    assert line == "the parameters themselves are not finite, as params['w']"


def test_nothing_is_found_where_only_the_sum_overflows():
    assert "only their sum" in examined(Linear(), batch_of(0))[0]


def test_what_is_known_is_said_when_memory_is_short():
    class Heavy(Rooted):
        def loss(self, *_, **__):
            raise RuntimeError("RESOURCE_EXHAUSTED")

    batch = batch_of(0)
    batch["x"][7] = np.nan
    assert examined(Heavy(), batch) == [
        "example 7 of the batch: t 0.8, sigma/alpha 4; its data are not finite (x)"
    ]
