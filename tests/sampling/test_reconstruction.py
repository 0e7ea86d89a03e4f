"""Reconstruction guidance against posteriors known exactly, and DPS against its algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.denoiser import Estimate, as_estimate
from diffusion.levels import NoiseLevel, posterior
from diffusion.sampling import grids, solvers
from diffusion.sampling.guidance import dps, moment_matched, pigdm, reconstruction, video
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample

rng = np.random.default_rng(0)
MEAN = np.array([0.3, -0.5, 0.2])
ROOT = np.array([[0.6, 0.0, 0.0], [0.4, 0.5, 0.0], [-0.3, 0.2, 0.3]])
COVARIANCE = ROOT @ ROOT.T
A = np.array([[1.0, 0.5, 0.0], [0.2, -1.0, 0.7]])
NOISE = 0.3
Y = np.array([[0.7, -0.4]])
LEVELS = [schedules.cosine()(0.6), schedules.EDM()(3.0), schedules.RectifiedFlow()(0.2)]
LEVELS += [schedules.SubVPSDE()(0.999)]


def gaussian(mean, covariance):
    """E[x_0 | x_t] of N(mean, covariance), x [B, d]."""

    variance, basis = np.linalg.eigh(covariance)

    def denoise(x, level):
        _, alpha, sigma = level.expand(2)
        error = (x - alpha * mean.astype(x.dtype)) @ basis.astype(x.dtype)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return mean + ((gain * error) @ basis.T).astype(x.dtype)

    return denoise


def given_y():
    """The posterior's mean and covariance."""
    gain = COVARIANCE @ A.T @ np.linalg.inv(A @ COVARIANCE @ A.T + NOISE**2 * np.eye(2))
    return MEAN + gain @ (Y[0] - A @ MEAN), COVARIANCE - gain @ A @ COVARIANCE


def measure(x):
    return x @ A.T


@pytest.mark.parametrize("level", LEVELS)
def test_moment_matched_is_the_posteriors_denoiser(level):
    """For any schedule; conjugate gradients need as many iterations as y has numbers."""
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((5, 3)))
        y = jnp.repeat(jnp.asarray(Y), 5, 0)
        prior = gaussian(MEAN, COVARIANCE)
        guided = moment_matched(prior, measure, y, NOISE, iterations=2)
        exact = gaussian(*given_y())(x, level)
        np.testing.assert_allclose(jax.jit(guided)(x, level).x0, exact, atol=1e-9)
        assert np.abs(prior(x, level) - exact).max() > 1e-2


def test_samples_have_the_posteriors_moments():
    """The prior's own denoiser, guided, draws from p(x_0 | y)."""
    count = 10_000
    grid = grids.karras(schedules.EDM(), 40)
    y = jnp.repeat(jnp.asarray(Y, jnp.float32), count, 0)
    guided = moment_matched(gaussian(MEAN, COVARIANCE), measure, y, NOISE, iterations=2)
    draw = jax.jit(lambda keys: sample(guided, solvers.heun(grid), keys, (3,)))
    x = np.asarray(draw(image_keys(0, range(count))))
    mean, covariance = given_y()
    np.testing.assert_allclose(x.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.015)
    assert np.abs(COVARIANCE - covariance).max() > 0.1


@pytest.mark.parametrize("level", LEVELS)
def test_pigdm_is_exact_for_isotropic_data(level):
    """Means of two pixels of four, prior N(m, s^2 I)."""
    s, mean = 0.7, np.array([0.1, -0.2, 0.3, 0.4])
    operator = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    gain = s**2 * operator.T / (s**2 / 2 + NOISE**2)
    after = s**2 * np.eye(4) - gain @ operator * s**2
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((3, 4)))
        guided = reconstruction(
            gaussian_mixture(mean[None], s),
            lambda x: x @ operator.T,
            jnp.repeat(jnp.asarray(Y), 3, 0),
            pigdm(NOISE, data_std=s, gain=0.5),
        )
        exact = gaussian(mean + gain @ (Y[0] - operator @ mean), after)(x, level)
        np.testing.assert_allclose(jax.jit(guided)(x, level).x0, exact, atol=1e-9)


def test_dps_is_its_algorithm():
    """Chung et al., algorithm 1, written out: DDPM's step, minus zeta' grad ||r||^2 / ||r||."""
    zeta = 0.1
    grid = grids.uniform(schedules.cosine(), 6)
    prior = gaussian_mixture(rng.standard_normal((3, 4, 4, 1)).astype(np.float32), 0.3)

    def shrink(x):  # not linear
        return jnp.tanh(x).reshape(len(x), 2, 2, 2, 2, 1).mean((2, 4))

    y = 0.5 * jnp.asarray(rng.standard_normal((2, 2, 2, 1)), jnp.float32)
    noises = rng.standard_normal((7, 2, 4, 4, 1)).astype(np.float32)
    beta = np.array([posterior(_at(grid, i), _at(grid, i + 1))[0] for i in range(6)])

    def weight(level):
        b = jnp.interp(level.t, grid.t[5::-1], beta[::-1])
        return zeta * jnp.sqrt(1 - b) / b

    guided = reconstruction(prior, shrink, y, dps(weight))
    solver = solvers.ddpm(grid)
    result = jax.jit(
        lambda: sample(guided, solver, image_keys(0, range(2)), (4, 4, 1), noises=noises)
    )()

    @jax.jit
    def gradient(x, level):
        def norm(x):
            return jnp.linalg.norm((y - shrink(prior(x, level))).reshape(2, -1), axis=1).sum()

        return jax.grad(norm)(x)  # grad ||r||^2 / ||r|| = 2 grad ||r||

    x = np.float32(solver.init) * noises[0]
    for i in range(6):
        now = jax.tree.map(jnp.float32, _at(grid, i))
        _, variance, c_x, c_x0 = posterior(_at(grid, i), _at(grid, i + 1))
        after = c_x * x + c_x0 * prior(x, now) + np.sqrt(variance) * noises[i + 1]
        x = after - zeta * 2 * gradient(x, now)
    np.testing.assert_allclose(result, x, rtol=1e-3, atol=1e-3)


def _at(grid, i):
    return NoiseLevel(*(leaf[i] for leaf in grid))


PRIOR = gaussian_mixture(rng.standard_normal((3, 4)), 0.4)
X = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)
LEVEL = NoiseLevel(*map(jnp.float32, (0.5, 0.8, 0.6)))


def variants(y):
    def half(x):
        return x[:, ::2] ** 2

    yield from (reconstruction(PRIOR, half, y, p) for p in (dps(0.3), pigdm(0.1), video(2.0)))
    yield moment_matched(PRIOR, half, y, 0.2)


def test_each_image_by_itself():
    """Levels of shape () and [B] agree, and other images in the batch do not matter."""
    y = jnp.asarray(rng.standard_normal((4, 2)), jnp.float32)
    levels = jax.tree.map(jnp.float32, schedules.cosine()(np.linspace(0.1, 0.9, 4)))

    @jax.jit
    def together(level):
        return [guided(X, level).x0 for guided in variants(y)]

    @jax.jit
    def alone(level):
        return [guided(X[2:3], level).x0 for guided in variants(y[2:3])]

    for batch, one in zip(together(levels), alone(_at(levels, 2))):
        assert np.abs(batch - PRIOR(X, levels)).max() > 1e-3
        np.testing.assert_allclose(one, batch[2:3], atol=1e-5)


def test_a_measurement_that_agrees_changes_nothing():
    y = PRIOR(X, LEVEL)[:, ::2] ** 2
    _, *smooth = variants(y)  # DPS divides by the residual's norm, be it rounding's
    for x0 in jax.jit(lambda: [guided(X, LEVEL).x0 for guided in smooth])():
        np.testing.assert_allclose(x0, PRIOR(X, LEVEL), atol=1e-6)


def test_no_signal_no_correction_and_fields_are_kept():
    """At alpha = 0 nothing is infinite; nu stays, and what clipping will need moves along."""
    nu = jnp.full_like(X, 0.3)

    def denoise(x, level):
        return Estimate(jnp.clip(x, -1, 1), nu, x)

    y = jnp.ones((4, 4))
    noisy = NoiseLevel(*map(jnp.float32, (1.0, 0.0, 1.0)))
    for p in (dps(1.0), pigdm(0.1), video(1.0)):
        guided = reconstruction(denoise, lambda x: x, y, p)
        np.testing.assert_array_equal(as_estimate(guided(X, noisy)).x0, jnp.clip(X, -1, 1))
        x0, kept, unclipped = guided(X, LEVEL)
        np.testing.assert_array_equal(kept, nu)
        np.testing.assert_allclose(unclipped - x0, X - jnp.clip(X, -1, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moment_matched(PRIOR, measure, Y, 0.0), "noise_std must be positive"),
        (lambda: moment_matched(PRIOR, measure, Y, 0.1, 0), "iterations must be at least 1"),
        (lambda: pigdm(0.1, data_std=0.0), "data_std > 0"),
        (
            lambda: reconstruction(PRIOR, lambda x: x, X[:2], video())(X, LEVEL),
            r"y has shape \(2, 4\), but measure gives \(4, 4\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
