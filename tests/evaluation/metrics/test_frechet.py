"""Distances between sets: closed forms, invariances, and zero where it must be."""

import numpy as np
import pytest

from diffusion.evaluation.metrics import frechet
from diffusion.evaluation.metrics.frechet import Statistics

rng = np.random.default_rng(0)


def random_statistics(seed, d=5):
    a = np.random.default_rng(seed).standard_normal((d + 3, d))
    return Statistics(a[0], a.T @ a / d, 100)


def test_statistics_are_numpys():
    x = rng.standard_normal((50, 4))
    s = frechet.statistics(x)
    np.testing.assert_allclose(s.mean, x.mean(0), atol=1e-14)
    np.testing.assert_allclose(s.cov, np.cov(x.T), atol=1e-14)
    assert s.n == 50


def test_merged_statistics_are_those_of_the_union():
    x = rng.standard_normal((60, 4)) + 100
    merged = frechet.statistics(x[:1]).merge(frechet.statistics(x[1:20]))
    merged = merged.merge(frechet.statistics(x[20:]))
    whole = frechet.statistics(x)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.cov, whole.cov, rtol=1e-10, atol=1e-12)
    assert merged.n == 60


def test_commuting_covariances_have_a_closed_form():
    p, q = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    a = Statistics(np.array([1.0, 2.0, 3.0]), (rotation * p) @ rotation.T, 10)
    b = Statistics(np.array([0.0, 2.0, 5.0]), (rotation * q) @ rotation.T, 10)
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


def test_energy_distance_of_gaussians_on_the_line():
    # E|N(m, s^2)| in closed form gives 2 E|a - b| - E|a - a'| - E|b - b'| for unit variances.
    from scipy.stats import foldnorm

    n, m = 4000, 1.5
    a, b, c = (rng.standard_normal((n, 1)) + shift for shift in (0, m, 0))
    root = np.sqrt(2)
    expected = 2 * foldnorm.mean(m / root, scale=root) - 2 * foldnorm.mean(0, scale=root)
    assert frechet.energy_distance(a, b) == pytest.approx(expected, rel=0.08)
    assert abs(frechet.energy_distance(a, c)) < 3e-3


def test_energy_distance_is_unbiased():
    draws = [frechet.energy_distance(*rng.standard_normal((2, 20, 2))) for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20
    assert np.min(draws) < 0


def test_sliced_wasserstein_of_a_shift():
    # Projected on a uniform direction, a shift s has mean square |s|^2 / D.
    x = rng.standard_normal((500, 3))
    shift = np.array([3.0, 0, 4])
    d = frechet.sliced_wasserstein(x, x + shift, slices=4000)
    assert d == pytest.approx(5 / np.sqrt(3), rel=0.03)
    assert frechet.sliced_wasserstein(x, x[::-1]) < 1e-12


def test_sliced_wasserstein_takes_sets_of_different_size():
    x, y = rng.standard_normal((4000, 2)), rng.standard_normal((1500, 2))
    assert frechet.sliced_wasserstein(x, y) < 0.1
    # Scaling by 2: W2 of N(0, 1) and N(0, 4) is 1 on every direction.
    assert frechet.sliced_wasserstein(x, 2 * y) == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="differ in dimension"):
        frechet.sliced_wasserstein(x, rng.standard_normal((10, 3)))


def test_nearest_distances_agree_with_all_pairs():
    a, b = rng.standard_normal((37, 2, 3, 1)), rng.standard_normal((23, 2, 3, 1))
    pairs = np.sqrt(((a[:, None] - b[None]) ** 2).sum((2, 3, 4)))
    np.testing.assert_allclose(frechet.nearest_distances(a, b, chunk=10), pairs.min(1), rtol=1e-5)
    assert np.all(frechet.nearest_distances(b[:5], b) == 0)
