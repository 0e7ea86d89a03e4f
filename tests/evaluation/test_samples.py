"""The report: perfect, useless and memorised samples are told apart."""

import json

import numpy as np
import pytest

from diffusion.data import densities, sources
from diffusion.evaluation import classifiers
from diffusion.evaluation.samples import evaluate_points, evaluate_samples


@pytest.fixture(scope="module")
def digits():
    train, test = sources.digits("train"), sources.digits("test")
    return classifiers.digits_svc(), train, test


def test_held_out_data_as_samples_are_as_good_as_real(digits):
    svc, train, test = digits
    real = test.all()
    report = evaluate_samples(real["x"], real["label"], svc, train, test)
    json.dumps(report)
    assert report["recognised"] == svc.accuracy == report["classifier_accuracy"]
    assert report["frechet"] < 1e-6
    assert report["frechet_half_size"] == 250
    assert 0 < report["frechet_half"] < report["frechet_real_halves"]  # the sets overlap
    assert report["nearest_ratio"] == 1
    assert (report["num_samples"], report["num_held_out"]) == (500, 500)
    per_class = report["recognised_per_class"]
    assert list(per_class) == [str(c) for c in range(10)]
    share = np.bincount(real["label"]) / 500
    assert np.dot(share, list(per_class.values())) == pytest.approx(report["recognised"])


def test_fresh_real_data_match_the_halves(digits):
    svc, train, test = digits
    some = train.read(np.random.default_rng(0).permutation(len(train))[:250])
    report = evaluate_samples(some["x"], some["label"], svc, train, test)
    assert report["frechet_half"] == pytest.approx(report["frechet_real_halves"], rel=0.15)
    assert report["nearest_train"] == report["nearest_ratio"] == 0  # memorised


def test_noise_and_wrong_labels_are_found(digits):
    svc, train, test = digits
    real = test.all()
    noise = np.random.default_rng(0).standard_normal((300, 8, 8, 1))
    report = evaluate_samples(noise, np.arange(300) % 10, svc, train, test)
    assert report["recognised"] < 0.3
    assert report["frechet"] > 10 * report["frechet_real_halves"]
    assert report["nearest_ratio"] > 1.5
    report = evaluate_samples(real["x"], (real["label"] + 1) % 10, svc, train, test)
    assert report["recognised"] < 0.02


def test_bad_samples_are_refused(digits):
    svc, train, test = digits
    x, label = np.zeros((4, 8, 8, 1)), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"\[N, 8, 8, 1\], got \(4, 8, 8\)"):
        evaluate_samples(x[..., 0], label, svc, train, test)
    with pytest.raises(ValueError, match=r"labels \[4\], got \(3,\)"):
        evaluate_samples(x, label[:3], svc, train, test)
    x[2, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 4 samples contain NaN"):
        evaluate_samples(x, label, svc, train, test)
    with pytest.raises(ValueError, match="contained in the training data"):
        evaluate_samples(np.zeros((4, 8, 8, 1)), label, svc, train, train)


def test_points_are_compared_with_fresh_ones():
    real = densities.sample("two_moons", 1000, np.random.default_rng(7))
    good = evaluate_points(real, "two_moons")
    bad = evaluate_points(real + np.float32(0.2), "two_moons")
    json.dumps(good)
    assert good["num_samples"] == 1000
    for name in ("sliced_wasserstein", "energy_distance"):
        assert good[f"{name}_real"] == bad[f"{name}_real"]
        assert abs(good[name]) < 0.1
        assert bad[name] > 3 * abs(good[name])
        assert bad[name] > 3 * abs(bad[f"{name}_real"])
    with pytest.raises(ValueError, match=r"\[N, 2\], got \(5, 3\)"):
        evaluate_points(np.zeros((5, 3)), "two_moons")
    with pytest.raises(ValueError, match="NaN"):
        evaluate_points(np.full((5, 2), np.nan), "two_moons")
