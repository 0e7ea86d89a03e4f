import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.objectives import times
from diffusion.objectives.times import by_quartile

FLOW = schedules.RectifiedFlow()
RNG = np.random.default_rng(0)
U = jnp.asarray(RNG.uniform(size=64), jnp.float32)


@pytest.mark.parametrize("distribution", [times.uniform, times.mode, times.cosmap])
def test_quartiles_are_those_of_the_noise(distribution):
    t = np.asarray(distribution(U, FLOW))
    (total, weight), *others = by_quartile(jnp.asarray(t), U, distribution, FLOW).values()
    assert total.shape == weight.shape == (4,) and not others
    bounds = np.sort(distribution(jnp.array([0.0, 0.25, 0.5, 0.75, 1.0]), FLOW))
    for k in range(4):
        inside = t[(t > bounds[k]) & (t <= bounds[k + 1])]
        assert weight[k] == pytest.approx(len(inside) / 64)
        assert float(total[k] / weight[k]) == pytest.approx(inside.mean(), rel=1e-5)


def test_pieces_average_to_the_whole():
    """Though one of four holds nothing of the noisiest quartile, and they hold unlike shares."""
    u = jnp.sort(U)
    loss = jnp.asarray(RNG.uniform(size=64), jnp.float32)
    whole = by_quartile(loss, u, times.uniform, FLOW)["loss_q"]
    pieces = jax.vmap(lambda loss, u: by_quartile(loss, u, times.uniform, FLOW))(
        loss.reshape(4, 16), u.reshape(4, 16)
    )["loss_q"]
    assert pieces.weight[:, 3].min() == 0
    averaged = pieces.total.mean(0) / pieces.weight.mean(0)
    np.testing.assert_allclose(averaged, whole.total / whole.weight, rtol=1e-5)
    assert float(whole.total.sum()) == pytest.approx(float(loss.mean()), rel=1e-5)


def test_a_quartile_that_is_not_finite_leaves_the_others():
    loss = jnp.where(U > 0.75, jnp.nan, 1.0)
    total, weight = by_quartile(loss, U, times.uniform, FLOW)["loss_q"]
    assert jnp.isnan(total[3])
    np.testing.assert_array_equal(total[:3], weight[:3])
