import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.objectives import times
from diffusion.objectives.metrics import by_quartile

FLOW = schedules.RectifiedFlow()
RNG = np.random.default_rng(0)
U = jnp.asarray(RNG.uniform(size=64), jnp.float32)


@pytest.mark.parametrize("distribution", [times.uniform, times.mode, times.cosmap])
def test_quartiles_are_those_of_the_noise(distribution):
    t = np.asarray(distribution(U, FLOW))
    found = by_quartile(jnp.asarray(t), U, distribution, FLOW)
    bounds = np.sort(distribution(jnp.array([0.0, 0.25, 0.5, 0.75, 1.0]), FLOW))
    assert list(found) == ["loss_q1", "loss_q2", "loss_q3", "loss_q4"]
    for k, part in enumerate(found.values()):
        inside = t[(t > bounds[k]) & (t <= bounds[k + 1])]
        assert part.weight == pytest.approx(len(inside) / 64)
        assert part.total / part.weight == pytest.approx(inside.mean(), rel=1e-5)


def test_pieces_average_to_the_whole():
    """Though one of four holds nothing of the noisiest quartile, and they hold unlike shares."""
    u = jnp.sort(U)
    loss = jnp.asarray(RNG.uniform(size=64), jnp.float32)
    whole = by_quartile(loss, u, times.uniform, FLOW)
    pieces = jax.vmap(lambda loss, u: by_quartile(loss, u, times.uniform, FLOW))(
        loss.reshape(4, 16), u.reshape(4, 16)
    )
    assert pieces["loss_q4"].weight.min() == 0
    for name, (total, weight) in whole.items():
        averaged = float(pieces[name].total.mean() / pieces[name].weight.mean())
        assert averaged == pytest.approx(float(total / weight), rel=1e-5)
    quarters = float(sum(part.total for part in whole.values()))
    assert quarters == pytest.approx(float(loss.mean()), rel=1e-5)


def test_a_quartile_that_is_not_finite_leaves_the_others():
    loss = jnp.where(U > 0.75, jnp.nan, 1.0)
    found = by_quartile(loss, U, times.uniform, FLOW)
    assert jnp.isnan(found["loss_q4"].total)
    assert all(found[f"loss_q{k}"].total == found[f"loss_q{k}"].weight for k in (1, 2, 3))
