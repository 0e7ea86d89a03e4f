"""The variational bound beside likelihoods known in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import schedules
from diffusion.denoiser import Estimate
from diffusion.evaluation.metrics.bound import variational_bound
from diffusion.levels import NoiseLevel
from diffusion.objectives.terms.variance import VariationalBound
from diffusion.sampling import grids
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys

MEAN, STD, COUNT = np.array([0.2, -0.3]), 0.5, 4096
GAUSSIAN = gaussian_mixture([MEAN], STD)
KEYS = image_keys(0, range(COUNT))


def of(value):
    """Mean and its standard error."""
    value = np.asarray(value, np.float64)
    return value.mean(), value.std() / np.sqrt(len(value))


@pytest.mark.parametrize(("name", "nu"), [("cosine", 1), ("flow", 1), ("edm", 0)])
def test_bound_lies_above_the_exact_likelihood_and_comes_close(name, nu):
    x = MEAN + STD * np.random.default_rng(0).normal(size=(COUNT, 2))
    exact = -stats.norm.logpdf(x, MEAN, STD).mean(1) / np.log(2)
    excess = []
    for steps in (10, 100) if nu else (100, 1000):
        if name == "cosine":
            grid = grids.uniform(schedules.cosine(), steps)
        elif name == "flow":
            grid = grids.uniform(schedules.RectifiedFlow(), steps)
        else:
            grid = grids.exponential(schedules.EDM(), steps)  # excess of order 1/T
        bound = jax.jit(partial(variational_bound, GAUSSIAN, grid, nu=nu))(x, KEYS)
        gap, error = of(bound.total - exact)
        assert gap > -4 * error
        excess.append(gap)
        assert np.all(bound.prior >= -1e-6) and np.all(bound.steps >= 0)
    assert excess[0] > 4 * max(excess[1], 0.01) and excess[1] < 0.1, excess


def test_discrete_bound_of_a_comb_is_its_entropy():
    """The exact denoiser knows the value as soon as there is little noise: log P, nearly."""
    values, pmf = np.array([-1.0, 0.0, 1.0]), np.array([0.2, 0.5, 0.3])
    comb = gaussian_mixture(values[:, None], 0.0, pmf)
    x = np.random.default_rng(1).choice(values, size=(COUNT, 1), p=pmf)
    entropy = -np.mean(np.log2(pmf[np.searchsorted(values, x[:, 0])]))
    grid = grids.uniform(schedules.cosine(), 200)
    run = jax.jit(partial(variational_bound, comb, grid, levels=3))
    bound = run(x, KEYS)
    mean, error = of(bound.total)
    assert -4 * error < mean - entropy < 0.05
    assert np.abs(bound.decoder).max() < 1e-5  # at the first step nothing is left to be said


def test_random_steps_have_the_same_mean_and_belong_to_their_image():
    x = MEAN + STD * np.random.default_rng(0).normal(size=(COUNT, 2))
    grid = grids.uniform(schedules.cosine(), 100)
    every = jax.jit(partial(variational_bound, GAUSSIAN, grid))(x, KEYS)
    some = jax.jit(partial(variational_bound, GAUSSIAN, grid, draws=7))(x, KEYS)
    np.testing.assert_allclose(some.prior, every.prior, atol=1e-6)
    np.testing.assert_allclose(some.decoder, every.decoder, atol=1e-4)
    difference, error = of(some.steps - every.steps)
    assert 0 < error < 0.2 and abs(difference) < 4 * error
    back = jax.jit(partial(variational_bound, GAUSSIAN, grid, draws=7))(x[::-1], KEYS[::-1])
    np.testing.assert_allclose(back.steps[::-1], some.steps, rtol=1e-4, atol=1e-5)


def test_terms_are_those_that_learned_variances_are_trained_on():
    """With a nu, T times the mean of the loss's terms over all T steps is steps + decoder."""
    table, steps = schedules.linear(steps=20), 20

    def denoise(x, level):
        return Estimate(0.3 * x, jnp.broadcast_to(0.4, x.shape))

    x, keys = np.full((2, 3), [[0.2], [-0.6]], np.float32), KEYS[:2]
    grid = grids.uniform(table, steps)
    draw = jax.vmap(lambda key, r: jax.random.normal(jax.random.fold_in(key, r), (3,)), (0, None))
    noise_of = jax.jit(draw)
    bound = jax.jit(partial(variational_bound, denoise, grid, levels=256))(x, keys)
    loss, total = jax.jit(VariationalBound(table, steps=steps).bits), 0
    for r in range(steps):
        level = table(jnp.full(2, (steps - r) / steps))
        noise = noise_of(keys, r)
        x_t = level.alpha[:, None] * x + level.sigma[:, None] * noise
        total += loss(level.t, x, x_t, 0.3 * x_t, jnp.full((2, 3), 0.4)) / steps
    np.testing.assert_allclose(bound.steps + bound.decoder, total, rtol=1e-3)


def test_errors():
    x, keys = np.zeros((2, 1)), KEYS[:2]
    grid = grids.uniform(schedules.cosine(), 5)
    with pytest.raises(ValueError, match="ends at sigma = 0"):
        variational_bound(GAUSSIAN, NoiseLevel(*(leaf[:-1] for leaf in grid)), x, keys)
    with pytest.raises(ValueError, match=r"draws must lie in 1\.\.4"):
        variational_bound(GAUSSIAN, grid, x, keys, draws=5)
