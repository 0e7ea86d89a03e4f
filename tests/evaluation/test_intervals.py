"""Intervals: closed forms, and repeated draws."""

import numpy as np
import pytest

from diffusion.evaluation import intervals


def test_interval_of_a_mean_has_a_closed_form():
    assert intervals.of_mean([0, 1] * 50) == pytest.approx(1.959964 * np.sqrt(0.25 / 99))
    assert intervals.of_mean([3.0]) == np.inf


def test_interval_of_a_median_is_that_of_repeated_draws():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((200, 400))

    def median(x):
        return np.median(x, axis=-1)

    half = np.mean([intervals.of_statistic(x, median, draws=100, seed=i) for i, x in
                    enumerate(draws[:40])])  # fmt: skip
    assert half == pytest.approx(1.959964 * median(draws).std(), rel=0.15)
