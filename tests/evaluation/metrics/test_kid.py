"""KID: its definition, subsets, zero in the mean for one distribution, and its sampling error."""

import numpy as np
import pytest

from diffusion.evaluation.metrics.kid import SEED, kid, metric
from diffusion.evaluation.metrics.metric import Judged
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import of_arrays

rng = np.random.default_rng(0)


def by_definition(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / len(pairs)
    return within - 2 * np.mean([k(a, b) for a in x for b in y])


def test_subsets_are_drawn_in_turn_and_each_is_the_definition():
    x, y = rng.standard_normal((14, 3)), rng.standard_normal((12, 3)) + 1
    draw = np.random.RandomState(SEED)
    expected = [
        by_definition(x[draw.choice(14, 8, replace=False)], y[draw.choice(12, 8, replace=False)])
        for _ in range(5)
    ]
    found = kid(x, y, subsets=5, size=8)
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-12)
    assert found.std == pytest.approx(np.std(expected), rel=1e-12)


def test_one_set_against_itself_is_below_zero_by_the_missing_diagonals():
    x = rng.standard_normal((30, 4))
    k = (x @ x.T / 4 + 1) ** 3
    expected = 2 * (k.sum() - np.trace(k)) / (30 * 29) - 2 * k.mean()
    found = kid(x, x, subsets=3, size=30)
    assert found.mean == pytest.approx(expected, rel=1e-4)
    assert found.mean < 0 and found.size == 30


@pytest.mark.parametrize("shift", [0.0, 0.4])
@pytest.mark.parametrize("n", [40, 160])
def test_standard_error_is_that_of_repeated_draws(shift, n):
    draw = np.random.default_rng(n)
    real = draw.standard_normal((1000, 5))
    found = []
    for _ in range(100):
        samples = draw.standard_normal((n, 5)) + shift
        found.append(kid(samples, draw.permutation(real), subsets=5, size=40))  # other subsets
    means, errors = np.array([f.mean for f in found]), np.array([f.error for f in found])
    assert 0.8 < np.sqrt((errors**2).mean()) / means.std(ddof=1) < (1.2 if shift else 1.35)


def test_one_distribution_is_zero_in_the_mean():
    draw = np.random.default_rng(0).standard_normal((200, 2, 40, 5))
    means = np.array([kid(x, y, subsets=1, size=40).mean for x, y in draw])
    assert abs(means.mean()) < 3 * means.std() / np.sqrt(len(means))


def test_few_examples_are_noted_and_sizes_must_agree():
    x = rng.standard_normal((20, 3))
    net = Network("net", lambda: None)
    real = of_arrays("real", {"features": x + 1})
    judged = Judged(of_arrays("samples", {"features": x}), lambda _: real, net)
    found = metric(subsets=3).measure(judged)
    assert list(found) == ["kid_net", "kid_net_std", "kid_net_ci", "kid_net_note"]
    assert "subsets of 20 members" in found["kid_net_note"]
    assert "kid_net_note" not in metric(subsets=3, size=10).measure(judged)
    with pytest.raises(ValueError, match="differ in size: 3 and 2"):
        kid(x, x[:, :2])
    with pytest.raises(ValueError, match="size must lie in"):
        metric(size=1)


def test_features_far_from_zero_keep_their_digits():
    x, y = (100 + s * rng.standard_normal((60, 16)).astype(np.float32) for s in (1, 1.1))
    k = [(a.astype(float) @ b.astype(float).T / 16 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    expected = sum((m.sum() - np.trace(m)) / (60 * 59) for m in k[:2]) - 2 * k[2].mean()
    assert kid(x, y, subsets=1, size=60).mean == pytest.approx(expected, rel=1e-9)


def test_one_example_is_too_few():
    for n, m in ((1, 5), (5, 1), (5, 0)):
        with pytest.raises(ValueError, match="number of examples"):
            kid(np.zeros((n, 3)), np.zeros((m, 3)))
