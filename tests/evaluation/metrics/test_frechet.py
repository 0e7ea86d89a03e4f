"""Distances between sets: closed forms, invariances, and zero where it must be."""

import numpy as np
import pytest

from diffusion.evaluation.metrics import frechet
from diffusion.evaluation.metrics.frechet import Statistics

rng = np.random.default_rng(0)


def random_statistics(seed, d=5):
    a = np.random.default_rng(seed).standard_normal((d + 3, d))
    return Statistics(a[0], a.T @ a / d)


def test_statistics_are_numpys():
    x = rng.standard_normal((50, 4))
    s = frechet.statistics(x)
    np.testing.assert_allclose(s.mean, x.mean(0), atol=1e-14)
    np.testing.assert_allclose(s.cov, np.cov(x.T), atol=1e-14)


def test_commuting_covariances_have_a_closed_form():
    p, q = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    a = Statistics(np.array([1.0, 2.0, 3.0]), (rotation * p) @ rotation.T)
    b = Statistics(np.array([0.0, 2.0, 5.0]), (rotation * q) @ rotation.T)
    expected = 1 + 4 + ((np.sqrt(p) - np.sqrt(q)) ** 2).sum()
    assert frechet.frechet_from_statistics(a, b) == pytest.approx(expected, rel=1e-7)


def test_general_covariances_agree_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = random_statistics(1), random_statistics(2)
    trace = np.trace(a.cov + b.cov - 2 * np.real(sqrtm(a.cov @ b.cov)))
    expected = ((a.mean - b.mean) ** 2).sum() + trace
    assert frechet.frechet_from_statistics(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_from_statistics(b, a) == pytest.approx(expected, rel=1e-9)


def test_same_set_is_zero_even_if_its_covariance_is_singular():
    x = rng.standard_normal((8, 64))
    assert frechet.frechet_distance(x, x) < 1e-6
    assert frechet.frechet_distance(x, x[::-1]) < 1e-6


def test_invariant_to_rotation_and_shift_and_quadratic_in_scale():
    x, y = rng.standard_normal((100, 6)), 2 * rng.standard_normal((80, 6)) + 1
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    d = frechet.frechet_distance(x, y)
    assert frechet.frechet_distance(x @ rotation + 3, y @ rotation + 3) == pytest.approx(d)
    assert frechet.frechet_distance(3 * x, 3 * y) == pytest.approx(9 * d)


def test_images_are_flattened_and_errors_are_clear():
    x = rng.standard_normal((20, 2, 2, 1))
    assert frechet.frechet_distance(x, x + 1) == pytest.approx(4)
    with pytest.raises(ValueError, match="differ in size: 4 and 3"):
        frechet.frechet_distance(x, rng.standard_normal((20, 3)))
    with pytest.raises(ValueError, match="NaN"):
        frechet.frechet_distance(x, np.full_like(x, np.nan))
    with pytest.raises(ValueError, match="at least one"):
        frechet.statistics(np.zeros((0, 3)))
