"""Intervals: closed forms, and repeated draws."""

import numpy as np
import pytest

from diffusion.evaluation import intervals


def test_interval_of_a_mean_has_a_closed_form():
    assert intervals.of_mean([0, 1] * 50) == pytest.approx(1.959964 * np.sqrt(0.25 / 99))
    assert intervals.of_mean([3.0]) == np.inf


def test_interval_of_a_share_is_wilsons():
    """Its ends solve |p - q| = z sqrt(q (1 - q) / n) in q, and it is not 0 where all agree."""
    for hits, n in ((3, 20), (10, 10), (0, 50)):
        p, z = hits / n, intervals.Z95
        ends = np.roots([1 + z**2 / n, -2 * p - z**2 / n, p**2])
        half = intervals.of_share(np.arange(n) < hits)
        assert half == pytest.approx(np.ptp(ends) / 2) and half > 0


def test_interval_by_groups_is_that_of_a_mean():
    """Of a figure whose variance is known: the difference of two means."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 400, 1)), rng.standard_normal((40, 800, 1))

    def apart(x, y):
        return [x.mean() - y.mean()]

    halves = [intervals.of_neighbours(apart, x, y, 20)[0] for x, y in zip(a, b, strict=True)]
    exact = 2.093024 * np.sqrt(1 / 400 + 1 / 800)  # Student's t of 19 degrees
    assert np.mean(halves) == pytest.approx(exact, rel=0.06)
    assert intervals.of_neighbours(apart, a[0, :39], b[0], 20)[0] == np.inf
