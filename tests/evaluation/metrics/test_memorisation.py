"""Copies, near copies and fresh samples are told apart; figures of points on a line are exact."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from diffusion.data import sources
from diffusion.evaluation import selection
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.memorisation import memorisation
from diffusion.evaluation.metrics.metric import Data, of_array


def test_points_on_a_line_by_hand():
    train = np.array([[0.0], [10.0], [11.0]])
    held_out = np.array([[4.0], [12.0], [13.0], [16.0]])  # distances 4, 1, 2, 5
    samples = np.array([[0.5], [11.5], [20.0]])  # distances 0.5, 0.5, 9
    found = memorisation(samples, held_out, train)
    assert found["nearest_train"] == 0.5 and found["nearest_train_real"] == 3
    assert found["nearest_ratio"] == pytest.approx(0.5 / 3)
    assert found["closer"] == pytest.approx(2 / 3)  # nearer than the nearest held-out one
    # 0 is 10 from the next training example, 11 is 1: 0.5 < 10 and 0.5 < 1, 9 > 1.
    assert found["authentic"] == pytest.approx(1 / 3)
    assert found["authentic_real"] == pytest.approx(2 / 4)  # 4 < 10, 1 = 1, 2 > 1, 5 > 1


def test_copies_and_fresh_samples():
    rng = np.random.default_rng(0)
    train, held_out, fresh = (rng.standard_normal((n, 5)) for n in (2000, 500, 500))
    honest = memorisation(fresh, held_out, train)
    assert abs(honest["copying_z"]) < 3
    assert abs(honest["nearest_ratio"] - 1) < honest["nearest_ratio_ci"] * 1.5
    assert honest["closer"] < 0.03 and abs(honest["authentic"] - 0.5) < 0.08
    copies = memorisation(train[:500], held_out, train)
    assert copies["nearest_train"] == copies["nearest_ratio"] == copies["authentic"] == 0
    assert copies["closer"] == 1 and copies["copying_z"] < -15
    some = np.concatenate([fresh[:450], train[:50] + 1e-3])
    assert memorisation(some, held_out, train)["closer"] == pytest.approx(0.1, abs=0.03)


def test_the_interval_covers_the_ratio():
    rng, hits = np.random.default_rng(1), 0
    train = rng.standard_normal((300, 3))
    known = [memorisation(*rng.standard_normal((2, 20_000, 3)), train)["nearest_ratio"]][0]
    for _ in range(60):
        found = memorisation(*rng.standard_normal((2, 200, 3)), train)
        hits += abs(found["nearest_ratio"] - known) < found["nearest_ratio_ci"]
    assert hits >= 50


def test_the_closest_samples_are_shown(tmp_path):
    train, test = sources.digits("train"), sources.digits("test")
    made = Harness(
        selection.make(("memorisation(pictures=3)",), SimpleNamespace()),
        None,
        lambda: Data(train, test),
    )
    x = test.all()["x"][:40].copy()
    x[7] = train[5]["x"]
    found = made.evaluate(of_array(x), folder=tmp_path, shard=9)
    assert found["closer_pixels"] >= 1 / 40 and found["nearest_train_pixels_real"] > 0
    from PIL import Image

    grid = np.asarray(Image.open(tmp_path / "memorisation.png"))
    scale = (grid.shape[0] - 2 * 4) // 24  # three rows of 8 pixels between gaps of 2
    rows = [grid[2 + k * (8 * scale + 2) :][: 8 * scale] for k in range(2)]
    first = [row[:, -(3 * (8 * scale + 2)) :][:, : 8 * scale] for row in rows]
    np.testing.assert_array_equal(*first)  # the copy stands above the example it is of


def test_chance_is_the_share_of_held_out_examples():
    draw = np.random.default_rng(0)
    train, ours, few = (draw.standard_normal((n, 4)) for n in (200, 1000, 20))
    found = memorisation(ours, few, train)
    assert found["closer_real"] == 1 / 20  # one of 20 is the closest, not 1 %
    assert abs(found["closer"] - found["closer_real"]) < found["closer_ci"]
    same = memorisation(np.ones((9, 1)), np.ones((9, 1)), np.zeros((4, 1)))
    assert same["closer"] == same["closer_real"] == 1 and same["copying_z"] == 0


def test_copying_z_is_that_of_mann_and_whitney_beyond_small_p_values():
    draw = np.random.default_rng(0)
    train = draw.standard_normal((50, 3))
    far = memorisation(1e-3 + train[:1].repeat(3000, 0) * draw.normal(1, 1e-6, (3000, 1)),
                       9 + draw.standard_normal((3000, 3)), train)  # fmt: skip
    n = 3000
    assert far["copying_z"] == pytest.approx(
        -n * n / 2 / np.sqrt(n * n * (2 * n + 1) / 12), rel=1e-3
    )
    a, b = draw.integers(1, 6, (40, 1)), draw.integers(2, 7, (30, 1))
    line = memorisation(a, b, np.array([[0.0], [-1.0]]))
    test = mannwhitneyu(a[:, 0], b[:, 0], use_continuity=False, method="asymptotic")
    assert line["copying_z"] == pytest.approx(-norm.isf(test.pvalue / 2), rel=1e-9)


def test_one_training_example_has_no_neighbour():
    with pytest.raises(ValueError, match="needs two training examples, got 1"):
        memorisation(np.ones((3, 1)), np.ones((3, 1)), np.zeros((1, 1)))
