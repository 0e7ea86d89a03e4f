"""Guidance: its equation, its fixed points, and how often it asks the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.conditioning import Conditioning, null_like
from diffusion.denoiser import Estimate, as_estimate
from diffusion.levels import NoiseLevel
from diffusion.sampling import guidance

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
COND = Conditioning(label=jnp.array([0, 1, 4]), image=jnp.ones((3, 4, 4, 1)))
NULL = null_like(COND, label=9)
LEVEL = NoiseLevel(jnp.float32(0.5), jnp.float32(0.8), jnp.float32(0.6))


def denoise(x, level, cond):
    level = level.expand(x.ndim)
    label = cond.label.reshape(-1, 1, 1, 1)
    return level.alpha * jnp.sin(x + label) + level.sigma * cond.image


def learned(x, level, cond):
    nu = jnp.broadcast_to(cond.label.reshape(-1, 1, 1, 1) / 9, x.shape)
    return Estimate(denoise(x, level, cond), nu)


def guided(scale, level=LEVEL, base=denoise):
    return as_estimate(guidance.classifier_free(base, COND, NULL, scale)(X, level)).x0


@pytest.mark.parametrize(
    "level", [LEVEL, NoiseLevel(*(jnp.linspace(0.2, a, 3) for a in (0.5, 0.8, 0.6)))]
)
def test_classifier_free_is_linear_between_its_ends(level):
    cond, null = denoise(X, level, COND), denoise(X, level, NULL)
    assert np.abs(cond - null).max() > 0.1
    np.testing.assert_allclose(guided(jnp.float32(1), level), cond, atol=1e-6)
    np.testing.assert_allclose(guided(0.0, level), null, atol=1e-6)
    np.testing.assert_allclose(guided(3.5, level), null + 3.5 * (cond - null), atol=1e-5)


def test_scale_per_image_and_traced():
    scales = jnp.array([0.5, 1.0, 4.0])
    each = jax.jit(guided)(scales)
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(each[i], guided(scale)[i], atol=1e-6)


def test_guiding_x0_is_guiding_eps():
    def eps(x0):
        return (X - LEVEL.alpha * x0) / LEVEL.sigma

    cond, null = eps(denoise(X, LEVEL, COND)), eps(denoise(X, LEVEL, NULL))
    np.testing.assert_allclose(eps(guided(2.0)), null + 2 * (cond - null), atol=1e-5)


@pytest.mark.parametrize(("scale", "batches"), [(1, [3]), (1.0, [3]), (2.0, [6]), (0, [6])])
def test_network_calls(scale, batches):
    seen = []

    def counting(x, level, cond):
        seen.append(len(x))
        return denoise(x, level, cond)

    guided(scale, base=counting)
    assert seen == batches


def test_learned_variances_are_those_of_cond():
    x0_hat, nu, _ = guidance.classifier_free(learned, COND, NULL, 3.0)(X, LEVEL)
    np.testing.assert_allclose(x0_hat, guided(3.0), atol=1e-6)
    np.testing.assert_array_equal(nu, learned(X, LEVEL, COND)[1])


@pytest.mark.parametrize(
    ("alpha", "sigma", "inside"),
    [(0.8, 0.08, False), (0.8, 0.6, True), (0.2, 0.9, False), (0.0, 1.0, False), (1, 2.0, True)],
)
@pytest.mark.parametrize("base", [denoise, learned])
def test_interval(alpha, sigma, inside, base):
    both = guidance.classifier_free(base, COND, NULL, 3.0)
    plain = guidance.conditional(base, COND)
    level = NoiseLevel(*map(jnp.float32, (0.5, alpha, sigma)))
    result = guidance.interval(both, plain, 0.3, 2.5)(X, level)
    expected = as_estimate((both if inside else plain)(X, level))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, expected)


def test_clip():
    plain = guidance.conditional(learned, COND)
    x0_hat, nu, unclipped = guidance.clip(plain, -0.5, 0.7)(X, LEVEL)
    np.testing.assert_array_equal(unclipped, plain(X, LEVEL)[0])
    np.testing.assert_array_equal(x0_hat, np.clip(plain(X, LEVEL)[0], -0.5, 0.7))
    np.testing.assert_array_equal(nu, plain(X, LEVEL)[1])


def test_dynamic_threshold():
    scale = jnp.array([0.5, 3.0, 10.0]).reshape(3, 1, 1, 1)
    result = guidance.dynamic_threshold(lambda x, level: scale * x, 0.9)(X, LEVEL).x0
    for i in range(3):
        image = np.asarray(scale * X)[i]
        s = max(np.quantile(np.abs(image), 0.9), 1.0)
        np.testing.assert_allclose(result[i], np.clip(image, -s, s) / s, atol=1e-5)
    inside = 0.1 * X
    np.testing.assert_array_equal(
        guidance.dynamic_threshold(lambda x, level: inside)(X, LEVEL).x0, inside
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: guidance.clip(d, 1, -1), "low < high, got low=1 and high=-1"),
        (lambda d: guidance.interval(d, d, 2, 1), "low < high"),
        (lambda d: guidance.dynamic_threshold(d, 99.5), r"\(0, 1\], got 99.5"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(guidance.conditional(denoise, COND))
