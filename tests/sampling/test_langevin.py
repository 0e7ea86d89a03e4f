"""The corrector's stationary moments, which are known for Gaussians at any step size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.denoiser import Stateful
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids, solvers
from diffusion.sampling.langevin import annealed_langevin, check_predictor, langevin
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample

MEAN, STD = 0.4, 0.5
LEVEL = NoiseLevel(*map(jnp.float32, (0.3, 0.8, 0.6)))
GAUSSIAN = gaussian_mixture([[MEAN]], STD)


@pytest.mark.parametrize("snr", [0.16, 0.5])
def test_annealed_forgets_its_start_and_leaves_the_marginal(snr):
    """Of a Gaussian with variance v: the mean, and v / (1 - e / (2 v)) with e = 2 (snr sigma)^2."""
    count = 20_000
    walk = jax.jit(partial(annealed_langevin, GAUSSIAN, level=LEVEL, steps=150, snr=snr))
    x = np.array(walk(jnp.full((count, 1), 3.0), keys=image_keys(0, range(count))))
    v = (0.8 * STD) ** 2 + 0.6**2
    stationary = v / (1 - (snr * 0.6) ** 2 / v)
    left = (1 - 2 * (snr * 0.6) ** 2 / v) ** 150 * (3 - 0.8 * MEAN)
    assert x.mean() == pytest.approx(0.8 * MEAN + left, abs=4 * np.sqrt(stationary / count))
    assert x.var() == pytest.approx(stationary, rel=4 * np.sqrt(2 / count))


def test_annealed_on_a_point_mass():
    """N(alpha mu, sigma^2 / (1 - snr^2)): nothing of the start, nothing but the noise."""
    point = gaussian_mixture([[0.7]], 0.0)
    count = 20_000
    start = jnp.full((count, 1), -2.0)
    walk = jax.jit(lambda x, keys: annealed_langevin(point, x, LEVEL, keys, steps=100, snr=0.3))
    x = np.array(walk(start, image_keys(1, range(count))))
    assert x.mean() == pytest.approx(0.8 * 0.7, abs=4 * 0.6 / np.sqrt(count))
    assert x.var() == pytest.approx(0.36 / (1 - 0.09), rel=4 * np.sqrt(2 / count))


IMAGE = (8, 8, 1)
WIDE = gaussian_mixture(np.full((1, *IMAGE), MEAN), STD)
WALK = jax.jit(lambda x, keys: langevin(WIDE, x, LEVEL, keys, steps=60, snr=0.3))


def test_step_by_norms_leaves_the_marginal_of_images():
    """|s| is about |z| / sqrt(v), so that e = 2 snr^2 v, and the variance v / (1 - snr^2)."""
    keys = image_keys(2, range(200))
    v = (0.8 * STD) ** 2 + 0.6**2
    x = np.array(WALK(jnp.zeros((200, *IMAGE)), keys))
    assert x.mean() == pytest.approx(0.8 * MEAN, abs=4 * np.sqrt(v / x.size))
    assert x.var() == pytest.approx(v / (1 - 0.09), rel=0.06)


def test_one_step_has_the_size_that_the_norms_give():
    keys = image_keys(3, range(3))
    x = jax.random.normal(jax.random.key(0), (3, *IMAGE))
    moved = jax.jit(partial(langevin, WIDE, level=LEVEL, snr=0.2))(x, keys=keys)
    score = (LEVEL.alpha * WIDE(x, LEVEL) - x) / LEVEL.sigma**2
    z = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (64,)))(keys)
    for i in range(3):
        e = 2 * (0.2 * np.linalg.norm(z[i]) / np.linalg.norm(score[i])) ** 2
        expected = x[i] + e * score[i] + np.sqrt(2 * e) * z[i].reshape(IMAGE)
        np.testing.assert_allclose(moved[i], expected, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch():
    keys = image_keys(4, range(200))
    x = jax.random.normal(jax.random.key(1), (200, *IMAGE))
    together = WALK(x, keys)
    other = WALK(x.at[1::2].multiply(5.0), keys)
    np.testing.assert_allclose(together[::2], other[::2], atol=1e-5)
    assert not np.allclose(together[1::2], other[1::2])


MIXTURE = gaussian_mixture([[-0.6], [0.5]], [0.1, 0.3], [0.4, 0.6])
SOLVER = solvers.ddpm(grids.karras(schedules.EDM(), 12))


@partial(jax.jit, static_argnames=("corrector", "denoise"))
def draw(keys, corrector, denoise=MIXTURE, x_init=None):
    return sample(denoise, SOLVER, keys, (1,), corrector=corrector, x_init=x_init)


CORRECTOR = partial(annealed_langevin, steps=8, snr=0.4)


def test_correcting_brings_few_steps_nearer_to_a_mixture():
    count = 20_000
    rng = np.random.default_rng(0)
    first = rng.random(count) < 0.4
    real = np.sort(np.where(first, -0.6, 0.5) + np.where(first, 0.1, 0.3) * rng.normal(size=count))
    keys = image_keys(5, range(count))
    distance = {}
    for name, corrector in (("without", None), ("with", CORRECTOR)):
        x = np.sort(np.array(draw(keys, corrector))[:, 0])
        distance[name] = np.abs(x - real).mean()  # Wasserstein
    assert distance["with"] < 0.6 * distance["without"], distance


def test_corrected_samples_of_a_point_end_there_and_belong_to_their_key():
    point = gaussian_mixture([[0.25]], 0.0)
    keys = image_keys(6, range(8))
    np.testing.assert_allclose(draw(keys, CORRECTOR, point), 0.25, atol=1e-6)
    together, alone = draw(keys, CORRECTOR), draw(keys[3:4], CORRECTOR)
    np.testing.assert_allclose(together[3:4], alone, atol=1e-6)
    assert len(np.unique(together)) == 8


def test_correctors_need_one_evaluation_per_step():
    grid = grids.uniform(schedules.RectifiedFlow(), 4)
    for solver in (solvers.ddim, solvers.ddpm, solvers.euler, solvers.dpmpp_2m):
        check_predictor(solver(grid), grid)
    schedule = schedules.RectifiedFlow()
    for solver in (solvers.heun(grid), solvers.midpoint(grid, schedule)):
        with pytest.raises(ValueError, match="one evaluation per step"):
            check_predictor(solver, grid)


def test_errors():
    x, keys = jnp.zeros((2, 1)), image_keys(0, range(2))
    with pytest.raises(ValueError, match="steps >= 1"):
        langevin(GAUSSIAN, x, LEVEL, keys, steps=0)
    with pytest.raises(ValueError, match="0 < snr"):
        annealed_langevin(GAUSSIAN, x, LEVEL, keys, snr=0.0)
    remembers = Stateful(lambda x: 0, lambda x, level, memory: (MIXTURE(x, level), memory))
    with pytest.raises(ValueError, match="has a memory"):
        sample(remembers, SOLVER, keys, (1,), corrector=CORRECTOR)
