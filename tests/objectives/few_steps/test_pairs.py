"""Which pairs of noise levels are compared, against the papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffusion import schedules
from diffusion.objectives import times
from diffusion.objectives.few_steps.pairs import Ect, Karras, Nodes, Segments, Setting, Trajectories

FLOW, EDM = schedules.RectifiedFlow(), schedules.EDM()
U = (jnp.arange(4096) + 0.5) / 4096


def of(pairs, schedule=FLOW, distribution=times.uniform, step=0, u=U):
    return pairs(u, Setting(schedule, distribution, step))


def test_nodes_follow_the_time_distribution():
    pair = of(Nodes(4), distribution=lambda u, s: u**2, u=jnp.array([0.1, 0.3, 0.6, 0.99]))
    np.testing.assert_allclose(pair.to.t, [0, 1 / 16, 1 / 4, 9 / 16], atol=1e-6)
    np.testing.assert_allclose(pair.now.t, [1 / 16, 1 / 4, 9 / 16, 1], atol=1e-6)
    np.testing.assert_array_equal(pair.end.t, 0)


def test_fifty_nodes_of_a_table_are_latent_consistency_models_indices():
    pair = of(Nodes(50), schedules.scaled_linear())
    np.testing.assert_allclose(
        np.unique(1000 * pair.now.t - 1), 20 * np.arange(1, 51) - 1, atol=1e-3
    )


def test_segments_end_where_they_begin():
    pair = of(Segments(4, nodes=8))
    np.testing.assert_allclose(pair.end.t, np.floor(np.asarray(U) * 4) / 4, atol=1e-6)
    np.testing.assert_allclose(pair.now.t - pair.to.t, 1 / 8, atol=1e-6)
    assert (pair.end.t <= pair.to.t + 1e-6).all()
    with pytest.raises(ValueError, match=r"nodes=33 must be a multiple of count=4; nearest: 32"):
        Segments(4, nodes=33)


def test_trajectories_end_anywhere_below_with_equal_chances():
    pair = of(Trajectories(4))
    for n in range(4):
        mine = np.isclose(pair.now.t, (n + 1) / 4)
        ends, counts = np.unique(np.round(np.asarray(pair.end.t)[mine] * 4), return_counts=True)
        np.testing.assert_array_equal(ends, np.arange(n + 1))
        np.testing.assert_allclose(counts / counts.sum(), 1 / (n + 1), atol=0.002)


def test_karras_nodes():
    pair = of(Karras(count=18), EDM)
    i = np.arange(18)
    sigma = (0.002 ** (1 / 7) + i / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    np.testing.assert_allclose(
        np.unique(np.round(pair.now.sigma / sigma[-1], 9)) * 80, sigma, rtol=1e-3
    )
    assert (pair.to.sigma[np.isclose(pair.now.sigma, 0.002, rtol=1e-3)] == 0).all()


def test_lognormal_masses_and_weights_of_improved_consistency_training():
    pair = of(Karras(count=11, mean=-1.1, std=2.0), EDM)
    i = np.arange(11)
    sigma = (0.002 ** (1 / 7) + i / 10 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    mass = np.diff(norm.cdf((np.log(sigma) + 1.1) / 2.0))
    place = np.searchsorted(sigma, np.asarray(pair.to.sigma) * (1 + 1e-4)) - 1
    found = np.bincount(place, minlength=10) / len(U)
    np.testing.assert_allclose(found, mass / mass.sum(), atol=3e-4)
    np.testing.assert_allclose(pair.weight, 1 / (pair.now.sigma - pair.to.sigma), rtol=1e-3)


@pytest.mark.parametrize(
    ("step", "count"), [(0, 10), (99, 10), (100, 20), (799, 1280), (10**6, 1280)]
)
def test_the_number_of_nodes_doubles(step, count):
    """Eight stages from 10 to 1280 within 800 steps."""
    assert int(Karras(1280, first=10, steps=800).number(step)) == count
    assert int(jax.jit(Karras(1280, first=10, steps=800).number)(step)) == count


@pytest.mark.parametrize("step", [0, 10, 25])
def test_easy_consistency_tuning(step):
    pair = of(Ect(every=10, q=2.0), EDM, times.log_normal, step)
    t, s = np.asarray(pair.now.sigma, np.float64), step // 10 + 1
    r = t * np.maximum(0, 1 - (1 + 8 / (1 + np.exp(t))) / 2**s)
    np.testing.assert_allclose(pair.to.sigma, r, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(pair.weight, 1 / (t - r), rtol=1e-4)
    assert step or (pair.to.sigma[t < 1] == 0).all()


def test_easy_consistency_tuning_at_pure_noise():
    pair = of(Ect(every=1), FLOW, step=5, u=jnp.array([0.5, 1.0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pair))
    assert 0.99 < pair.to.t[1] < 1
