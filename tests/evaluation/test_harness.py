"""Metrics by name, on the same samples: perfect, useless and memorised ones are told apart."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.data import densities, sources
from diffusion.evaluation import harness
from diffusion.evaluation.metrics.metric import Data, Drawn
from diffusion.evaluation.views import VIEWS
from diffusion.pipelines.codec import Codec
from diffusion.pipelines.conditioners import Captions, Conditioner, Labels

OF_DIGITS = ("recognition('digits_svc')", "frechet('digits_svc')", "nearest()")


def pipeline(view="images", conditioner=None):
    conditioner = conditioner or Conditioner()
    return SimpleNamespace(view=VIEWS[view], codec=Codec(), conditioner=conditioner)


@pytest.fixture(scope="module")
def digits():
    """(images, labels, other held-out data) -> figures."""
    model = pipeline(conditioner=Labels(10))
    chosen = harness.make(OF_DIGITS, model)
    train, test = sources.digits("train"), sources.digits("test")

    def report(x, label, held_out=test):
        draw = lambda: Drawn(x, label)
        return harness.evaluate(chosen, model, {}, Data(train, held_out), draw)

    return report, train, test


def test_held_out_data_as_samples_are_as_good_as_real(digits):
    judge, _, test = digits
    real = test.all()
    report = judge(real["x"], real["label"])
    json.dumps(report)
    assert report["recognised"] == report["recognised_real"] > 0.98
    assert report["frechet"] < 1e-6
    assert report["frechet_half_size"] == 250
    assert 0 < report["frechet_half"] < report["frechet_half_real"]  # the sets overlap
    assert report["nearest_ratio"] == 1 and report["recognised_real_count"] == 500
    per_class = report["recognised_per_class"]
    assert list(per_class) == [str(c) for c in range(10)]
    share = np.bincount(real["label"]) / 500
    assert np.dot(share, list(per_class.values())) == pytest.approx(report["recognised"])
    assert f"recognised: {report['recognised']:.4g} (real data " in harness.lines(report)[0]


def test_fresh_real_data_match_the_halves(digits):
    judge, train, _ = digits
    some = train.read(np.random.default_rng(0).permutation(len(train))[:250])
    report = judge(some["x"], some["label"])
    assert report["frechet_half"] == pytest.approx(report["frechet_half_real"], rel=0.15)
    assert report["nearest_train"] == report["nearest_ratio"] == 0  # memorised


def test_noise_and_wrong_labels_are_found(digits):
    judge, _, test = digits
    real = test.all()
    noise = np.random.default_rng(0).standard_normal((300, 8, 8, 1))
    report = judge(noise, np.arange(300) % 10)
    assert report["recognised"] < 0.3
    assert report["frechet"] > 10 * report["frechet_half_real"]
    assert report["nearest_ratio"] > 1.5
    assert judge(real["x"], (real["label"] + 1) % 10)["recognised"] < 0.02


def test_bad_samples_are_refused(digits):
    judge, train, _ = digits
    x, label = np.zeros((4, 8, 8, 1)), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"recognition.*: .*\[N, 8, 8, 1\], got \(4, 8, 8\)"):
        judge(x[..., 0], label)
    with pytest.raises(ValueError, match=r"a subject for each of the 4 samples, got 3"):
        judge(x, label[:3])
    x[2, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 4 samples contain NaN"):
        judge(x, label)
    with pytest.raises(ValueError, match="contained in the training data"):
        judge(np.zeros((4, 8, 8, 1)), label, train)


def test_points_are_compared_with_fresh_ones():
    model, data = pipeline("points"), Data(*(sources.points("two_moons", seed=s) for s in (0, 1)))
    chosen = harness.make("auto", model)
    assert list(chosen) == ["wasserstein()", "energy()"]
    real = densities.sample("two_moons", 1000, np.random.default_rng(7))

    def judge(x):
        return harness.evaluate(chosen, model, {}, data, lambda: Drawn(x, [0] * len(x)))

    good, bad = judge(real), judge(real + np.float32(0.2))
    json.dumps(good)
    for name in ("sliced_wasserstein", "energy_distance"):
        assert good[f"{name}_real"] == bad[f"{name}_real"]
        assert abs(good[name]) < 0.1
        assert bad[name] > 3 * abs(good[name])
        assert bad[name] > 3 * abs(bad[f"{name}_real"])
    with pytest.raises(ValueError, match=r"\[N, 2\], got \(5, 3\)"):
        judge(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN"):
        judge(np.full((5, 2), np.nan))


def test_which_metrics_are_chosen_and_refused():
    captions = pipeline(conditioner=Captions(lambda texts: {}))
    assert list(harness.make("auto", captions)) == ["caption_gap()", "retrieval()", "nearest()"]
    assert harness.make("auto", pipeline()) == harness.make((), pipeline()) == {}
    listed = harness.make("nearest(), bits(bound(draws=3), count=20)", pipeline())
    assert list(listed) == ["nearest()", "bits(bound(draws=3), count=20)"]
    for given, message in [
        ("nearst()", r"config\.m: unknown 'nearst'.*mean 'nearest'"),
        ("recognition('svm')", r"config\.m=.*unknown 'svm'.*digits_svc"),
        ("recognition('lenet5', 'nowhere.npz')", r"config\.m=.*no file 'nowhere.npz'"),
        ("bits(odes())", r"config\.m: unknown 'odes'.*mean 'ode'"),
        ("bits(ode(divergence='exat'))", r"config\.m=.*unknown 'exat'.*mean 'exact'"),
        ("bits(ode(), count=0)", r"config\.m=.*count"),
    ]:
        with pytest.raises(ValueError, match=message):
            harness.make(given, pipeline(), "config.m")


def test_figures_have_one_name_and_samples_are_drawn_once():
    drawn = []

    def draw():
        drawn.append(1)
        return Drawn(np.zeros((2, 1)), [0, 0])

    def metric(name, value):
        return lambda model, params, data, draw: draw() and {name: value}

    chosen = {"a()": metric("x", 1.0), "b()": metric("y", 2.0)}
    assert harness.evaluate(chosen, None, {}, None, draw) == {"x": 1.0, "y": 2.0}
    assert drawn == [1]
    with pytest.raises(ValueError, match="two metrics give the figure x"):
        harness.evaluate(chosen | {"c()": metric("x", 3.0)}, None, {}, None, draw)


@pytest.mark.parametrize(
    "metric, option",
    [
        ("energy(seed=-1)", "seed"),
        ("wasserstein(seed=-1)", "seed"),
        ("frechet('digits_svc', splits=0)", "splits"),
        ("caption_gap(draws=0)", "draws"),
        ("caption_gap('discrete(steps=-5)')", "steps"),
        ("bits(ode(rtol=0.0))", "rtol"),
        ("bits(ode(max_steps=0))", "max_steps"),
        ("bits(ode(sigma_min=-1.0))", "sigma_min"),
        ("bits(bound(steps=-1))", "steps"),
        ("bits(bound(), seed=-1)", "seed"),
        ("bits(bound(), count=0)", "count"),
    ],
)
def test_options_are_checked_before_anything_is_drawn(metric, option):
    with pytest.raises(ValueError, match=rf"metrics=.*{option} must"):
        harness.make((metric,), pipeline())
