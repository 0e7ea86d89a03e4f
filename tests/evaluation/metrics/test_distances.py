"""Distances between sets of points: closed forms, no bias."""

import numpy as np
import pytest

from diffusion.evaluation.metrics.energy import energy_distance
from diffusion.evaluation.metrics.wasserstein import sliced_wasserstein

rng = np.random.default_rng(0)


def test_energy_distance_of_gaussians_on_the_line():
    # E|N(m, s^2)| in closed form gives 2 E|a - b| - E|a - a'| - E|b - b'| for unit variances.
    from scipy.stats import foldnorm

    n, m = 4000, 1.5
    a, b, c = (rng.standard_normal((n, 1)) + shift for shift in (0, m, 0))
    root = np.sqrt(2)
    expected = 2 * foldnorm.mean(m / root, scale=root) - 2 * foldnorm.mean(0, scale=root)
    assert energy_distance(a, b) == pytest.approx(expected, rel=0.08)
    assert abs(energy_distance(a, c)) < 3e-3


def test_energy_distance_is_unbiased():
    draws = [energy_distance(*rng.standard_normal((2, 20, 2))) for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20
    assert np.min(draws) < 0


def test_sliced_wasserstein_of_a_shift():
    # Projected on a uniform direction, a shift s has mean square |s|^2 / D.
    x = rng.standard_normal((500, 3))
    shift = np.array([3.0, 0, 4])
    d = sliced_wasserstein(x, x + shift, slices=4000)
    assert d == pytest.approx(5 / np.sqrt(3), rel=0.03)
    assert sliced_wasserstein(x, x[::-1]) < 1e-12


def test_sliced_wasserstein_takes_sets_of_different_size():
    x, y = rng.standard_normal((4000, 2)), rng.standard_normal((1500, 2))
    assert sliced_wasserstein(x, y) < 0.1
    # Scaling by 2: W2 of N(0, 1) and N(0, 4) is 1 on every direction.
    assert sliced_wasserstein(x, 2 * y) == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="differ in dimension"):
        sliced_wasserstein(x, rng.standard_normal((10, 3)))
