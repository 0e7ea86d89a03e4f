"""The ODE's likelihood against densities known in closed form; at float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from diffusion import schedules
from diffusion.sampling.likelihood import (
    Likelihood,
    bits_per_dim,
    discrete_log_likelihood,
    exact,
    hutchinson,
    hutchinson_gaussian,
    log_likelihood,
    truncated_normal,
    uniform,
)
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys

FLOW = schedules.RectifiedFlow()
GAUSSIAN = dict(sigma_min=1e-4, rtol=1e-7, atol=1e-7)
STD = 0.5


def gaussian_data(mean):
    """In pairs about the mean, so that what is odd in x averages out."""
    noise = np.random.default_rng(0).normal(size=(32, *np.shape(mean)))
    return mean + STD * np.concatenate([noise, -noise])


@pytest.mark.parametrize(
    "schedule",
    [schedules.linear(), schedules.VPSDE(), schedules.EDM(), FLOW],
    ids=lambda schedule: type(schedule).__name__,
)
def test_gaussian_on_every_kind_of_schedule(schedule):
    """Exact up to the prior: N(0, I) is where samplers start, not quite where this process ends."""
    mean = np.array([0.1, -0.2])
    x = gaussian_data(mean)
    with jax.enable_x64(True):
        run = jax.jit(
            lambda x: log_likelihood(gaussian_mixture([mean], STD), schedule, x, **GAUSSIAN)
        )
        log_p = np.asarray(run(x).log_p)
    # Along the ODE a Gaussian stays one, so that the end and the stretching are known.
    level = schedule(np.float64(schedule.t_max))
    sin = level.sigma / np.hypot(level.alpha, level.sigma)
    cos = level.alpha / np.hypot(level.alpha, level.sigma)
    end_std = np.hypot(cos * STD, sin)
    start_std = np.hypot(STD, 1e-4)
    end = cos * mean + end_std / start_std * (x - mean)
    pushed = stats.norm.logpdf(end).sum(1) + 2 * np.log(end_std / start_std)
    np.testing.assert_allclose(log_p, pushed, atol=1e-5)
    density = stats.norm.logpdf(x, mean, STD).sum(1)
    assert bits_per_dim(log_p, (2,)).mean() == pytest.approx(
        bits_per_dim(density, (2,)).mean(), abs=1e-4
    )


@pytest.mark.parametrize("base", [FLOW, schedules.VPSDE()], ids=["flow", "vp_sde"])
def test_a_network_that_sees_the_moved_time(base):
    """And nothing else: a shifted schedule's t is the time of ``base`` with as much noise."""
    gaussian = gaussian_mixture([np.zeros(1)], STD)
    x = np.array([[0.1], [0.7], [1.0]])
    with jax.enable_x64(True):
        found = log_likelihood(
            lambda x, level: gaussian(x, base(level.t)), base.shifted(3.0), x, sigma_min=1e-3
        )
    np.testing.assert_allclose(found.log_p, [-0.246, -1.206, -2.226], atol=2e-3)


MEANS, STDS, WEIGHTS = np.array([[-0.6], [0.5]]), np.array([0.1, 0.3]), np.array([0.4, 0.6])


def mixture_log_p(x, extra=0.0):
    each = stats.norm.logpdf(x, MEANS.T, np.hypot(STDS, extra)) + np.log(WEIGHTS)
    return logsumexp(each, axis=1)


@partial(jax.jit, static_argnames=("schedule", "sigma_min", "divergence"))
def mixture(x, keys, schedule=FLOW, sigma_min=1e-3, divergence=exact):
    denoise = gaussian_mixture(MEANS, STDS, WEIGHTS)
    options = dict(sigma_min=sigma_min, divergence=divergence)
    return log_likelihood(denoise, schedule, x, keys, rtol=1e-6, atol=1e-6, **options)


def test_mixture_in_one_dimension():
    x = np.linspace(-1.2, 1.4, 64)[:, None]
    with jax.enable_x64(True):
        result = mixture(x, image_keys(0, range(64)))
    np.testing.assert_allclose(result.log_p, mixture_log_p(x, 1e-3), atol=1e-4)
    assert np.all(result.evaluations > 50) and len(np.unique(result.evaluations)) > 3


def test_steps_and_results_do_not_depend_on_the_batch():
    x = np.linspace(-1.2, 1.4, 64)[:, None]
    keys = image_keys(0, range(64))
    with jax.enable_x64(True):
        together = mixture(x, keys)
        others = np.where(np.arange(64)[:, None] % 2, x, 3 * x)
        mixed = mixture(others, keys)
    odd = np.arange(64) % 2 == 1
    np.testing.assert_allclose(mixed.log_p[odd], together.log_p[odd], rtol=1e-12)
    np.testing.assert_array_equal(mixed.evaluations[odd], together.evaluations[odd])
    assert np.any(mixed.evaluations[~odd] != together.evaluations[~odd])


def test_hutchinson_has_the_mean_of_the_trace():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))

    def f(z):
        return (matrix @ z.ravel()).reshape(z.shape)

    z = jnp.ones((2, 2))
    trace = float(jnp.trace(matrix))
    assert float(exact(f, z, jax.random.key(0))[1]) == pytest.approx(trace, rel=1e-5)
    keys = jax.random.split(jax.random.key(1), 4000)
    for estimate in (hutchinson, hutchinson_gaussian, partial(hutchinson, probes=3)):
        value, drawn = jax.vmap(lambda key, estimate=estimate: estimate(f, z, key))(keys)
        np.testing.assert_allclose(value[0], f(z), rtol=1e-5)
        error = float(drawn.std() / math.sqrt(len(keys)))
        assert error > 0 and abs(float(drawn.mean()) - trace) < 4 * error


CORRELATED = gaussian_mixture(np.array([[0.4, 0.3], [-0.4, -0.3]]), 0.3)  # J is not diagonal


@partial(jax.jit, static_argnames="divergence")
def correlated(x, keys, divergence):
    return log_likelihood(CORRELATED, FLOW, x, keys, divergence=divergence, rtol=1e-4, atol=1e-4)


def test_hutchinson_likelihood_is_unbiased_and_depends_on_the_images_own_key():
    x = np.tile([[0.3, 0.4]], (512, 1))
    keys = image_keys(0, range(512))
    expected = float(correlated(x[:1], keys[:1], exact).log_p[0])
    drawn = np.asarray(correlated(x, keys, hutchinson).log_p)
    error = drawn.std() / math.sqrt(len(drawn))
    assert 1e-4 < error < 0.05
    assert abs(drawn.mean() - expected) < 4 * error
    again = np.asarray(correlated(x, keys[::-1], hutchinson).log_p)
    np.testing.assert_allclose(again[::-1], drawn, atol=1e-4)


def test_discrete_data_at_their_own_noise_level():
    """A comb of points: its pmf comes back, to the last digit, if u is what the model expects."""
    values, pmf = np.array([-1.0, 0.0, 1.0]), np.array([0.2, 0.5, 0.3])
    comb = gaussian_mixture(values[:, None], 0.0, pmf)
    keys = image_keys(0, range(96))
    x = np.repeat(values, 32)[:, None]
    with jax.enable_x64(True):
        log_p = jax.jit(partial(log_likelihood, comb, FLOW, sigma_min=0.02, rtol=1e-6, atol=1e-6))
        run = partial(
            discrete_log_likelihood,
            log_p,
            jnp.asarray(x),
            keys,
            3,
            sigma=0.02,
            dequantization=truncated_normal,
        )
        result = jax.jit(run)()
        np.testing.assert_allclose(np.exp(result.log_p), np.repeat(pmf, 32), rtol=1e-4)
        # The same comb spread evenly over its bins is so unlikely that it shows.
        even = jax.jit(partial(run, dequantization=uniform))()
        assert float(even.log_p.mean()) < float(result.log_p.mean()) - 10


def test_dequantization_bounds_the_probability_of_a_bin_and_samples_tighten_it():
    """A Gaussian's mass in bins of width 1/2: uniform u gives less, more samples less less."""
    levels, std = 5, 0.3
    x = np.repeat(np.linspace(-1, 1, levels), 200)[:, None]
    mass = stats.norm.cdf(x + 0.25, 0, std) - stats.norm.cdf(x - 0.25, 0, std)

    def density(x, keys):
        log_p = jax.scipy.stats.norm.logpdf(x, 0, std).sum(1)
        return Likelihood(log_p, jnp.ones(len(x), int))

    keys = image_keys(0, range(len(x)))
    gaps = []
    for samples in (1, 4, 64):
        result = discrete_log_likelihood(density, x, keys, levels, sigma=0.1, samples=samples)
        gaps.append(float(np.mean(np.log(mass[:, 0]) - result.log_p)))
        assert np.all(result.evaluations == samples)
    assert gaps[0] > 2 * gaps[1] > 8 * gaps[2] > 0
    # The offset of 8-bit images: a density of 1 everywhere on bins of width 1 / 127.5.
    flat = discrete_log_likelihood(
        lambda x, keys: Likelihood(jnp.zeros(len(x)), jnp.ones(len(x), int)),
        np.zeros((2, 3)),
        keys[:2],
        256,
        sigma=0.1,
    )
    np.testing.assert_allclose(bits_per_dim(flat.log_p, (3,)), math.log2(127.5), rtol=1e-6)


@pytest.mark.parametrize(("width", "sigma"), [(0.5, 0.05), (0.1, 0.2), (0.125, 0.02)])
def test_truncated_normal_is_normalised_and_stays_in_its_bin(width, sigma):
    u, log_q = jax.vmap(lambda key: truncated_normal(key, (1,), width, sigma))(
        image_keys(0, range(2000))
    )
    assert np.abs(u).max() <= width / 2 * (1 + 1e-5)
    frozen = stats.truncnorm(-width / 2 / sigma, width / 2 / sigma, scale=sigma)
    np.testing.assert_allclose(log_q, frozen.logpdf(np.asarray(u[:, 0])), rtol=1e-3, atol=1e-3)
    assert float(u.std()) == pytest.approx(frozen.std(), rel=0.06)


def test_conditioning_belongs_to_its_image():
    means = jnp.array([-0.5, 0.5])

    def denoise(x, level, cond):
        pull = 0.04 * level.alpha / (0.04 * level.alpha**2 + level.sigma**2)
        mean = means[cond][:, None]
        return mean + pull * (x - level.alpha * mean)

    x = np.array([[0.4], [0.4], [-0.3]])
    cond = jnp.array([0, 1, 0])
    log_p = jax.jit(lambda x, cond: log_likelihood(denoise, FLOW, x, cond=cond).log_p)(x, cond)
    expected = stats.norm.logpdf(x[:, 0], means[cond], 0.2)
    np.testing.assert_allclose(log_p, expected, atol=2e-2)


def test_errors():
    x = jnp.zeros((2, 1))
    with pytest.raises(ValueError, match=r"keys \[2\]"):
        log_likelihood(CORRELATED, FLOW, x, image_keys(0, range(3)))
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        log_likelihood(CORRELATED, schedules.EDM(), x, sigma_max=100.0)
    with pytest.raises(ValueError, match="samples >= 1"):
        discrete_log_likelihood(None, x, image_keys(0, range(2)), 256, sigma=0.1, samples=0)


def test_too_few_steps_give_nan_rather_than_a_number():
    run = jax.jit(lambda x: log_likelihood(CORRELATED, FLOW, x, max_steps=3).log_p)
    assert np.isnan(run(jnp.zeros((1, 2)))).all()
