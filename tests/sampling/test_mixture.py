"""The exact denoiser of a mixture, against numerical integration and its own limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.levels import NoiseLevel
from diffusion.sampling.mixture import gaussian_mixture

MEANS, STDS, WEIGHTS = [[-0.5], [0.4], [1.0]], [0.2, 0.0, 0.4], [1.0, 2.0, 0.5]


def level(alpha, sigma):
    return NoiseLevel(*map(jnp.asarray, (0.3, alpha, sigma)))


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.3), (0.6, 0.8), (0.9, 4.0), (0.01, 1.0)])
def test_posterior_mean_by_quadrature(alpha, sigma):
    x = np.linspace(-2, 2, 9)[:, None]
    z, dz = np.linspace(-8, 8, 4001, retstep=True)
    numerator = denominator = 0
    for (mean,), std, weight in zip(MEANS, STDS, WEIGHTS):
        x0 = mean + std * z  # integrate over the component's own standard normal
        density = weight * np.exp(-0.5 * z**2 - 0.5 * ((x - alpha * x0) / sigma) ** 2) * dz
        numerator = numerator + (x0 * density).sum(1)
        denominator = denominator + density.sum(1)
    with jax.enable_x64(True):
        D = jax.jit(gaussian_mixture(MEANS, STDS, WEIGHTS))(x, level(alpha, sigma))
    np.testing.assert_allclose(D[:, 0], numerator / denominator, rtol=1e-9, atol=1e-12)


def test_tweedie():
    """alpha D = x + sigma^2 grad log p(x), in two dimensions, with p written out apart."""
    means, stds, weights = np.array([[-0.5, 0.2], [0.6, 0.1]]), np.array([0.2, 0.3]), [0.3, 0.7]
    alpha, sigma = 0.7, 0.5

    def log_p(x):
        v = (alpha * stds) ** 2 + sigma**2
        square = ((x - alpha * means) ** 2).sum(-1)
        return jnp.log(jnp.sum(jnp.asarray(weights) * jnp.exp(-0.5 * square / v) / v))

    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (5, 2))
        D = jax.jit(gaussian_mixture(means, stds, weights))(x, level(alpha, sigma))
        score = jax.jit(jax.vmap(jax.grad(log_p)))(x)
        np.testing.assert_allclose(alpha * D, x + sigma**2 * score, rtol=1e-10)


def test_no_signal_gives_the_mean_and_a_point_itself():
    x = jnp.array([[3.0], [-1.0]])
    mean = np.average(np.ravel(MEANS), weights=WEIGHTS)
    D = jax.jit(gaussian_mixture(MEANS, STDS, WEIGHTS))(x, level(0.0, 1.0))
    np.testing.assert_allclose(D, np.full((2, 1), mean), rtol=1e-5)
    point = jax.jit(gaussian_mixture([[0.25]]))(x, level(0.9, 0.1))
    np.testing.assert_array_equal(point, [[0.25]] * 2)


def test_images_and_levels_per_example():
    means = np.random.default_rng(0).normal(size=(3, 2, 2, 1))
    denoise = jax.jit(gaussian_mixture(means, 0.1))
    x = jax.random.normal(jax.random.key(1), (4, 2, 2, 1))
    alpha, sigma = jnp.linspace(0.2, 0.9, 4), jnp.linspace(0.9, 0.2, 4)
    together = denoise(x, NoiseLevel(alpha, alpha, sigma))
    for i in range(4):
        one = denoise(x[i : i + 1], level(alpha[i], sigma[i]))
        np.testing.assert_allclose(together[i : i + 1], one, atol=1e-6)


@pytest.mark.parametrize(
    ("stds", "weights", "message"),
    [(-0.1, None, "stds must be >= 0"), (0.1, [1, 0, 1], "weights > 0"), (0, [1], "3 weights")],
)
def test_errors(stds, weights, message):
    with pytest.raises(ValueError, match=message):
        gaussian_mixture(MEANS, stds, weights)
