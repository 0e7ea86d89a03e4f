"""Neighbours that float32 cannot tell apart are still the nearest."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from diffusion.evaluation import neighbours
from diffusion.evaluation.metrics.precision_recall import precision_recall

rng = np.random.default_rng(0)


def outlier(n):
    x = rng.normal(size=(n, 16))
    x[0] = 1e6
    return x


def ring(n):
    angle = rng.integers(0, 8, n) * np.pi / 4
    return 4 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.01 * rng.normal(size=(n, 2))


HARD = {
    "an outlier moves the common mean": outlier,
    "narrow modes far from each other": ring,
    "squares beyond float32": lambda n: 1e20 * rng.normal(size=(n, 4)),
    "squares below float32": lambda n: 1e-25 * rng.normal(size=(n, 4)),
    "many copies": lambda n: rng.integers(0, 2, (n, 3)),
}


@pytest.mark.parametrize("made", HARD.values(), ids=HARD)
def test_nearest_are_those_of_brute_force(made, monkeypatch):
    monkeypatch.setattr(neighbours, "COLUMNS", 300)
    a, b = (made(500).astype(np.float32) for _ in range(2))
    d = cdist(a.astype(float), b.astype(float))
    found, index = neighbours.nearest(a, b, 3)
    np.testing.assert_allclose(found, np.sort(d, axis=1)[:, :3], rtol=1e-12)
    np.testing.assert_allclose(np.take_along_axis(d, index, 1), found, rtol=1e-12)


def test_balls_of_numbers_beyond_float32():
    samples, real = (1e20 * rng.normal(size=(60, 4)).astype(np.float32) for _ in range(2))
    found = precision_recall(samples, real)
    small = precision_recall(samples / np.float32(2**66), real / np.float32(2**66))
    np.testing.assert_array_equal(found, small)
    assert 0 < found[0].mean() <= 1


@pytest.mark.parametrize("open_balls", [False, True])
def test_copies_count_and_are_asked_once(open_balls, monkeypatch):
    pairs, distance = [], neighbours._distance
    monkeypatch.setattr(
        neighbours, "_distance", lambda a, b: pairs.append(len(a)) or distance(a, b)
    )
    points = rng.integers(0, 2, (400, 3)).astype(np.float32)
    centres = rng.integers(0, 2, (300, 3)).astype(np.float32)
    radius = rng.choice([0.0, 1.0, 2**0.5], 300)
    d = cdist(points.astype(float), centres.astype(float))
    held = d < radius if open_balls else d <= radius
    found = neighbours.inside(points, centres, radius, open_balls=open_balls)
    np.testing.assert_array_equal(found[0], held.sum(1))
    np.testing.assert_array_equal(found[1], held.sum(0))
    assert sum(pairs) <= 8 * 300  # of 8 different points
