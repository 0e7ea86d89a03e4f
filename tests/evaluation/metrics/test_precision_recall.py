"""Precision, recall, density and coverage: brute force, duplicates, prdc, and tiles."""

import numpy as np
import pytest
from prdc import compute_prdc
from scipy.spatial.distance import cdist

from diffusion.evaluation import neighbours
from diffusion.evaluation.intervals import of_share
from diffusion.evaluation.metrics import density_coverage, precision_recall
from diffusion.evaluation.metrics.metric import Judged
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import of_arrays

rng = np.random.default_rng(0)


def float32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def brute(samples, real, k):
    def manifold(x):
        return np.sort(cdist(x, x), axis=1)[:, k]

    to_real, to_samples = cdist(samples, real), cdist(real, samples)
    return (to_real <= manifold(real)).any(1), (to_samples <= manifold(samples)).any(1)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_precision_and_recall_are_those_of_brute_force(monkeypatch, shift):
    monkeypatch.setattr(neighbours, "ROWS", 37)
    monkeypatch.setattr(neighbours, "COLUMNS", 53)
    monkeypatch.setattr(neighbours, "PAIRS", 5)
    samples, real = 0.7 * float32(150, 6) + np.float32(shift), float32(120, 6) + np.float32(shift)
    precise, recalled = precision_recall.precision_recall(samples, real, 3)
    expected = brute(samples.astype(float), real.astype(float), 3)
    np.testing.assert_array_equal(precise, expected[0])
    np.testing.assert_array_equal(recalled, expected[1])
    assert 0 < precise.mean() < 1 and 0 < recalled.mean() < 1


def test_one_set_against_itself_is_precise_and_recalled():
    x = float32(60, 200)
    for found in precision_recall.precision_recall(x, x, 3):
        assert found.all()


def test_copies_have_radius_zero_and_hold_only_their_equals():
    x = np.repeat(1e3 + float32(5, 40), 4, axis=0)
    np.testing.assert_array_equal(neighbours.radii(x, 3), 0)
    near = np.nextafter(x[:1], np.float32(np.inf))
    held, holding = neighbours.inside(np.concatenate([x[:1], near]), x, np.zeros(20))
    np.testing.assert_array_equal(held, [4, 0])
    np.testing.assert_array_equal(holding, [1] * 4 + [0] * 16)
    assert not neighbours.inside(x, x, np.zeros(20), open_balls=True)[0].any()


def test_samples_on_the_surface_belong_to_closed_balls():
    real = float32(50, 300)
    radius = neighbours.radii(real, 3)
    third = neighbours.nearest(real, real, 4)[1][:, 3]
    for i in range(50):
        own = (real[third[i : i + 1]], real[i : i + 1], radius[i : i + 1])
        assert neighbours.inside(*own)[0][0] == 1
        assert neighbours.inside(*own, open_balls=True)[0][0] == 0


def test_neighbours_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 16)
    monkeypatch.setattr(neighbours, "COLUMNS", 30)
    a, b = 500 + float32(50, 8), 500 + float32(70, 8)
    distances, indices = neighbours.nearest(a, b, 3)
    d = cdist(a.astype(float), b.astype(float))
    np.testing.assert_array_equal(indices, np.argsort(d, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(d, axis=1)[:, :3], rtol=1e-12)
    distances, indices = neighbours.nearest(a, b[:2], 2)
    np.testing.assert_array_equal(np.sort(indices), [[0, 1]] * 50)
    with pytest.raises(ValueError, match="k must lie in"):
        neighbours.nearest(a, b[:2], 3)
    with pytest.raises(ValueError, match="differ in size: 8 and 7"):
        neighbours.nearest(a, b[:, 1:])


def test_tiles_leave_no_more_doubt_than_stated():
    """Errors of float32 tiles stay below ROUNDING (|a| + |b|)^2, for wide features too."""
    for d in (8, 2048):
        a, b = 3 + float32(64, d), 3 + float32(80, d)
        squares = cdist(a.astype(float), b.astype(float)) ** 2
        a_, b_ = np.linalg.norm(a, axis=1)[:, None], np.linalg.norm(b, axis=1)[None]
        tile = neighbours._candidates(a, b, 80)
        bounds = np.empty(squares.shape)
        np.put_along_axis(bounds, np.asarray(tile[1]), np.asarray(tile[0]), 1)
        gap = squares - (bounds + (a.astype(float) ** 2).sum(1)[:, None])
        assert (gap > 0).all()
        assert (gap < 2 * neighbours.ROUNDING * (a_ + b_) ** 2).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_density_and_coverage_are_prdcs(scale):
    samples, real = scale * float32(90, 7), float32(90, 7)
    expected = compute_prdc(real.astype(float), samples.astype(float), 5)
    density, coverage = density_coverage.density_coverage(samples, real, 5)
    assert density.mean() == pytest.approx(expected["density"], rel=1e-12)
    assert coverage.mean() == pytest.approx(expected["coverage"], rel=1e-12)


def test_surfaces_of_a_lattice_do_not_count_as_in_prdc():
    samples, real = (rng.integers(0, 9, (60, 2)).astype(np.float32) for _ in range(2))
    expected = compute_prdc(real.astype(float), samples.astype(float), 5)
    density, coverage = density_coverage.density_coverage(samples, real, 5)
    assert density.mean() == pytest.approx(expected["density"], rel=1e-12)
    assert coverage.mean() == pytest.approx(expected["coverage"], rel=1e-12)


def test_figures_of_halves_stand_beside_those_of_real_halves():
    """Of one distribution they agree, however many samples there are."""
    net = Network("net", lambda: None)
    real = of_arrays("real", {"features": float32(400, 4)})
    samples = of_arrays("samples", {"features": float32(4000, 4)})
    found = precision_recall.metric().measure(Judged(samples, lambda _: real, net))
    for name in ("precision", "recall"):
        half, beside = (found[f"{name}_net_half{end}"] for end in ("", "_real"))
        assert half == pytest.approx(beside, abs=0.1)


def test_density_of_one_distribution_is_one():
    density, coverage = density_coverage.density_coverage(float32(3000, 2), float32(3000, 2), 5)
    assert density.mean() == pytest.approx(1, abs=0.05)
    assert coverage.mean() == pytest.approx(1 - 2**-5, abs=0.02)


def test_figures_and_their_intervals():
    net = Network("net", lambda: None)
    samples, real = float32(80, 3), of_arrays("real", {"features": float32(100, 3)})
    judged = Judged(of_arrays("samples", {"features": samples}), lambda _: real, net)
    found = precision_recall.metric().measure(judged)
    ends = ("", "_ci", "_half", "_half_real")
    names = {f"{n}_net{end}" for n in ("precision", "recall") for end in ends}
    assert set(found) == {*names, "precision_net_half_size"}
    assert found["precision_net_half_size"] == 50
    assert of_share(np.ones(80)) < found["precision_net_ci"] < 0.2
    found = density_coverage.metric(most=50).measure(judged)
    expected = density_coverage.density_coverage(samples[:50], real.array(most=50))
    assert found["density_net"] == expected[0].mean()
    assert found["coverage_net"] == expected[1].mean()
    assert set(found) == {f"{n}_net{e}" for n in ("density", "coverage") for e in ("", "_ci")}
    with pytest.raises(ValueError, match="neighbours must lie in"):
        precision_recall.metric(neighbours=0)
    with pytest.raises(ValueError, match="3 neighbours of each example need 4 examples, got 3"):
        precision_recall.precision_recall(samples[:3], samples)


def test_few_examples_have_no_halves_and_no_interval():
    net, x = Network("net", lambda: None), float32(7, 2)
    judged = Judged(
        of_arrays("samples", {"features": x}), lambda _: of_arrays("real", {"features": x}), net
    )
    assert precision_recall.metric().measure(judged) == {"precision_net": 1, "recall_net": 1}


def test_where_all_agree_the_interval_is_not_empty():
    net, x = Network("net", lambda: None), float32(60, 2)
    real = of_arrays("real", {"features": x})
    judged = Judged(of_arrays("samples", {"features": x}), lambda _: real, net)
    found = precision_recall.metric().measure(judged)
    assert found["precision_net"] == 1 and found["precision_net_ci"] > 0.02


def test_intervals_of_neighbours_are_no_shorter_than_repeated_draws_demand():
    """Examples share neighbours: as independent hits, the interval of coverage covers 70 %."""
    net, draw, found = Network("net", lambda: None), np.random.default_rng(0), []
    for _ in range(25):
        samples, real = (of_arrays("x", {"features": draw.normal(size=(160, 8))}) for _ in range(2))
        judged = Judged(samples, {"": real}.get, net)
        found.append(density_coverage.metric().measure(judged))
    for name in ("density", "coverage"):
        spread = np.std([f[f"{name}_net"] for f in found], ddof=1)
        assert 0.8 < np.mean([f[f"{name}_net_ci"] for f in found]) / (1.96 * spread) < 2
