"""Measurements against NumPy and SciPy, and their pseudo-inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from diffusion.sampling import measurements as m

X = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)


def test_average_pool_and_its_inverse():
    y = m.average_pool(X, 4)
    assert y.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(y[1, 1, 2], X[1, 4:, 8:].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(m.average_pool(m.repeat_pixels(y, 4), 4), y, rtol=1e-5)
    # The pseudo-inverse: A A^+ A = A, and A^+ A is symmetric.
    u, v = jnp.asarray(X), jnp.asarray(X[::-1])
    project = lambda x: m.repeat_pixels(m.average_pool(x, 4), 4)
    np.testing.assert_allclose((u * project(v)).sum(), (v * project(u)).sum(), rtol=1e-4)


@pytest.mark.parametrize("std", [0.5, 1.7])
def test_gaussian_blur_is_scipys(std):
    reach = int(np.ceil(3 * std))
    expected = X
    for axis in (1, 2):
        expected = ndimage.gaussian_filter1d(expected, std, axis, mode="mirror", radius=reach)
    blur = jax.jit(m.gaussian_blur, static_argnums=1)
    np.testing.assert_allclose(blur(X, std), expected, atol=1e-6)
    np.testing.assert_allclose(blur(np.ones_like(X), std), 1, rtol=1e-5)


def test_all_are_differentiable():
    for measure in (lambda x: m.average_pool(x, 2), lambda x: m.gaussian_blur(x, 1.0)):
        gradient = jax.jit(jax.grad(lambda x, f=measure: (f(x) ** 2).sum()))(X)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.average_pool(X, 5), "must divide the picture's 8 x 12, got 5"),
        (lambda: m.gaussian_blur(X, 0.0), "std must be positive"),
        (lambda: m.gaussian_blur(X, 3.0), "less than the picture's 8 x 12"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
