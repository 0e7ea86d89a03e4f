"""What networks of few steps are told besides: where they aim, and the scale of guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.conditioning import Conditioning
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP

TOLD = {"two_times": True, "guidance_width": 8}
NETWORKS = {
    "mlp": (MLP(8, 1, **TOLD), (2,)),
    "dit": (DiT(width=8, depth=1, heads=2, patch=2, time_scale=0.01, **TOLD), (4, 4, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_new_inputs_begin_without_effect_and_then_have_one(name):
    network, shape = NETWORKS[name]
    x, time = jax.random.normal(jax.random.key(0), (2, *shape)), jnp.array([0.3, 0.6])
    plain = Conditioning(guidance=jnp.ones(2))
    told = [plain.replace(span=jnp.full(2, 0.3)), plain.replace(guidance=jnp.full(2, 4.0))]
    params = network.init(jax.random.key(1), x, time, plain)
    noise = jax.random.normal(jax.random.key(2), (1,))
    new = ("cond_proj", "span_embedd")

    def moved(path, leaf):
        """All but the new inputs' last layers, which begin at zero."""
        keys = jax.tree_util.keystr(path)
        zero = "cond_proj" in keys or ("span_embedd" in keys and "linear_2" in keys)
        return leaf if zero else leaf + 0.3 * noise[0]

    def shaken(leaf):
        return leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    others = jax.tree_util.tree_map_with_path(moved, params)
    same = network.apply(others, x, time, plain)
    for cond in told:
        np.testing.assert_array_equal(network.apply(others, x, time, cond), same)
    all_moved = jax.tree.map(shaken, params)
    before = network.apply(all_moved, x, time, plain)
    for cond in told:
        assert np.abs(network.apply(all_moved, x, time, cond) - before).max() > 1e-4
    assert any(
        part in jax.tree_util.keystr(path)
        for path, _ in jax.tree.leaves_with_path(params)
        for part in new
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_scale_that_is_not_given_is_asked_for(name):
    network, shape = NETWORKS[name]
    x = jnp.zeros((2, *shape))
    with pytest.raises(ValueError, match=r"cond\.guidance is None.*guidance_width"):
        network.init(jax.random.key(0), x, jnp.zeros(2), Conditioning())


def test_the_time_scale_of_a_transformer_slows_its_sinusoids():
    network, shape = NETWORKS["dit"]
    x, cond = jnp.ones((1, *shape)), Conditioning(guidance=jnp.ones(1))
    params = network.init(jax.random.key(0), x, jnp.ones(1), cond)
    params = jax.tree.map(lambda p: p + 0.1, params)
    fast = network.clone(time_scale=1.0)
    np.testing.assert_allclose(
        network.apply(params, x, jnp.array([50.0]), cond),
        fast.apply(params, x, jnp.array([0.5]), cond),
        rtol=1e-5,
        atol=1e-6,
    )
