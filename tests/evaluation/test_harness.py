"""Metrics by name, on the same samples: perfect, useless and memorised ones are told apart."""

import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.data import densities, sources
from diffusion.evaluation import merits, selection
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.frechet import frechet_distance
from diffusion.evaluation.metrics.metric import Data, Metric, Samples, of_array
from diffusion.evaluation.networks.digits_svc import digits_svc
from diffusion.evaluation.networks.network import Network, pixels
from diffusion.evaluation.shards import Shards
from diffusion.evaluation.views import VIEWS
from diffusion.pipelines.codec import Codec
from diffusion.pipelines.conditioners import Captions, Conditioner, Labels

OF_DIGITS = ("recognition(digits_svc)", "frechet(pixels)", "memorisation()")


def pipeline(view="images", conditioner=None):
    conditioner = conditioner or Conditioner()
    return SimpleNamespace(view=VIEWS[view], codec=Codec(), conditioner=conditioner)


@pytest.fixture(scope="module")
def digits():
    """(images, labels, other held-out data) -> figures."""
    model = pipeline(conditioner=Labels(10))
    chosen = selection.make(OF_DIGITS, model)
    train, test = sources.digits("train"), sources.digits("test")
    known = Harness(chosen, model, lambda: Data(train, test))

    def report(x, label, held_out=test):
        made = known if held_out is test else Harness(chosen, model, lambda: Data(train, held_out))
        return made.evaluate(of_array(x, label), {})

    return report, train, test


def test_held_out_data_as_samples_are_as_good_as_real(digits):
    judge, _, test = digits
    real = test.all()
    report = judge(real["x"], real["label"])
    json.dumps(report)
    assert report["recognised"] == report["recognised_real"] > 0.98
    assert report["fd_pixels"] < 1e-6
    assert report["fd_pixels_half_size"] == 250
    assert 0 < report["fd_pixels_half"] < report["fd_pixels_half_real"]  # the sets overlap
    assert report["nearest_ratio_pixels"] == 1 and report["recognised_real_count"] == 500
    per_class = report["recognised_per_class"]
    assert list(per_class) == [str(c) for c in range(10)]
    share = np.bincount(real["label"]) / 500
    assert np.dot(share, list(per_class.values())) == pytest.approx(report["recognised"])
    assert merits.lines(report)[0].startswith(f"recognised: {report['recognised']:.4g} ± ")
    assert " (real data " in merits.lines(report)[0]


def test_fresh_real_data_match_the_halves(digits):
    judge, train, _ = digits
    some = train.read(np.random.default_rng(0).permutation(len(train))[:250])
    report = judge(some["x"], some["label"])
    assert report["fd_pixels_half"] == pytest.approx(report["fd_pixels_half_real"], rel=0.15)
    assert report["nearest_train_pixels"] == report["nearest_ratio_pixels"] == 0  # memorised


def test_noise_and_wrong_labels_are_found(digits):
    judge, _, test = digits
    real = test.all()
    noise = np.random.default_rng(0).standard_normal((300, 8, 8, 1))
    report = judge(noise, np.arange(300) % 10)
    assert report["recognised"] < 0.3
    assert report["fd_pixels"] > 10 * report["fd_pixels_half_real"]
    assert report["nearest_ratio_pixels"] > 1.5
    assert judge(real["x"], (real["label"] + 1) % 10)["recognised"] < 0.02


def test_bad_samples_are_refused(digits):
    judge, train, _ = digits
    x, label = np.zeros((4, 8, 8, 1)), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"samples \[N, 8, 8, 1\], as .* got \(4, 8, 8\)"):
        judge(x[..., 0], label)
    with pytest.raises(ValueError, match=r"samples \[N, 8, 8, 1\], as .* got \(4, 16, 8, 1\)"):
        judge(np.zeros((4, 16, 8, 1)), label)
    with pytest.raises(ValueError, match=r"a subject for each of the 4 samples, got 3"):
        judge(x, label[:3])
    with pytest.raises(ValueError, match=r"recognition.*a class of each example; samples has none"):
        judge(x, ())
    with pytest.raises(ValueError, match=r"two samples at least, got 1"):
        judge(x[:1], label[:1])
    x[2, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1 of 4 samples contain NaN"):
        judge(x, label)
    with pytest.raises(ValueError, match=r"contained in the training data"):
        judge(np.zeros((4, 8, 8, 1)), label, train)


def test_points_are_compared_with_fresh_ones():
    model, data = pipeline("points"), Data(*(sources.points("two_moons", seed=s) for s in (0, 1)))
    chosen = selection.make("auto", model)
    assert list(chosen) == ["wasserstein()", "energy()"]
    real = densities.sample("two_moons", 1000, np.random.default_rng(7))

    made = Harness(chosen, model, lambda: data)

    def judge(x):
        return made.evaluate(of_array(x, [0] * len(x)), {})

    good, bad = judge(real), judge(real + np.float32(0.2))
    json.dumps(good)
    for name in ("sliced_wasserstein", "energy_distance"):
        assert good[f"{name}_real"] == bad[f"{name}_real"]
        assert abs(good[name]) < 0.1
        assert bad[name] > 3 * abs(good[name])
        assert bad[name] > 3 * abs(bad[f"{name}_real"])
    with pytest.raises(ValueError, match="points differ in dimension: 3 and 2"):
        judge(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN"):
        judge(np.full((5, 2), np.nan))


def test_which_metrics_are_chosen_and_refused():
    captions = pipeline(conditioner=Captions(lambda texts: {}))
    assert list(selection.make("auto", captions)) == [
        "caption_gap()",
        "retrieval()",
        "memorisation()",
    ]
    assert selection.make("auto", pipeline()) == selection.make((), pipeline()) == {}
    listed = selection.make("memorisation(), bits(bound(draws=3), count=20)", pipeline())
    assert list(listed) == ["memorisation()", "bits(bound(draws=3), count=20)"]
    for given, message in [
        ("memorizaton()", r"config\.m: unknown 'memorizaton'.*mean 'memorisation'"),
        ("recognition(svm)", r"config\.m: unknown 'svm'.*digits_svc"),
        ("recognition(lenet5('nowhere.npz'))", r"config\.m=.*no file 'nowhere.npz'"),
        ("recognition(pixels)", r"config\.m=.*output of pixels: unknown 'label'; .*features"),
        ("frechet(digits_svc)", r"config\.m=.*output of digits_svc: unknown 'features'.*label"),
        ("frechet()", r"config\.m=.*needs a feature network: config.evaluation.features="),
        ("frechet('digits_svc')", r"config\.m: frechet\(features='digits_svc'\).*Network"),
        ("bits(odes())", r"config\.m: unknown 'odes'.*mean 'ode'"),
        ("bits(ode(divergence='exat'))", r"config\.m=.*unknown 'exat'.*mean 'exact'"),
        ("bits(ode(), count=0)", r"config\.m=.*count"),
    ]:
        with pytest.raises(ValueError, match=message):
            selection.make(given, pipeline(), "config.m")


def mean(name, **options):
    """A metric with one figure, the mean of the samples."""
    options = {"network": pixels()} | options
    return Metric(lambda judged: {name: float(judged.samples.array().mean())}, **options)


def test_figures_have_one_name_and_samples_are_drawn_once():
    drawn = []

    def draw(first, end):
        drawn.append((first, end))
        return np.arange(10.0)[first:end, None]

    samples = Samples(10, draw, [0] * 10)
    chosen = {"a()": mean("x"), "b()": mean("y", most=4)}
    found = Harness(chosen).evaluate(samples, shard=4)
    assert (found["x"], found["y"]) == (4.5, 1.5)
    assert drawn == [(0, 4), (4, 8), (8, 10)]
    assert [found["provenance"][name]["count"] for name in ("a()", "b()")] == [10, 4]
    with pytest.raises(ValueError, match="two metrics give the figure x"):
        Harness(chosen | {"c()": mean("x")}).evaluate(samples)


def test_per_class_is_each_class_alone(digits):
    _, train, test = digits
    data = lambda: Data(train, test)
    real = train.all()
    x, label = real["x"][:300], real["label"][:300].tolist()
    model = pipeline(conditioner=Labels(10))
    made = Harness(selection.make(("per_class(frechet(pixels))",), model), model, data)
    found = made.evaluate(of_array(x, label), {}, shard=70)["fd_pixels_per_class"]
    assert list(found) == [str(c) for c in range(10)]
    three = np.array(label) == 3
    known = test.all()
    own = frechet_distance(x[three], known["x"][known["label"] == 3])
    assert found["3"] == pytest.approx(own, rel=1e-6)
    with pytest.raises(ValueError, match=r"per_class.*none"):
        made.evaluate(of_array(x), {})
    with pytest.raises(ValueError, match=r"digits test has no example of class 77"):
        made.evaluate(of_array(x, [77] * 300), {})
    with pytest.raises(ValueError, match=r"per_class needs a metric of samples"):
        selection.make(("per_class(bits(ode()))",), model)


def test_figures_do_not_depend_on_shards(digits):
    real = digits[1].all()
    samples = of_array(real["x"][:230], real["label"][:230].tolist())
    made = Harness(
        selection.make(OF_DIGITS, pipeline(conditioner=Labels(10))),
        pipeline(),
        lambda: Data(digits[1], digits[2]),
    )
    whole, cut = (made.evaluate(samples, {}, shard=shard) for shard in (1000, 37))
    assert whole.pop("provenance") == cut.pop("provenance")
    per_class = whole.pop("recognised_per_class")
    assert per_class == cut.pop("recognised_per_class")
    assert whole.pop("classifier") == cut.pop("classifier")
    assert whole.pop("fd_pixels_note", "") == cut.pop("fd_pixels_note", "")
    assert whole == pytest.approx(cut, rel=1e-6)


def test_a_stopped_judgement_goes_on_and_parts_are_joined(tmp_path):
    drawn, made = [], Harness({"a()": mean("x")})

    def draw(first, end, stop=None):
        if first == stop:
            raise KeyboardInterrupt
        drawn.append(first)
        return np.arange(50.0)[first:end, None]

    stopped = Samples(50, lambda first, end: draw(first, end, 30), [0] * 50)
    with pytest.raises(KeyboardInterrupt):
        made.collect(stopped, None, Shards(10, tmp_path / "a"))
    assert made.collect(Samples(50, draw, [0] * 50), None, Shards(10, tmp_path / "a"))
    assert drawn == [0, 10, 20, 30, 40]
    drawn.clear()
    parts = [Shards(10, tmp_path / "b") for _ in range(3)]
    finished = [
        made.collect(Samples(50, draw, [0] * 50), None, shards, part=(i, 3))
        for i, shards in enumerate(parts)
    ]
    assert finished == [False, False, True] and sorted(drawn) == [0, 10, 20, 30, 40]
    samples = Samples(50, draw, [0] * 50)
    figures = [made.figures(samples, None, Shards(10, tmp_path / name)) for name in "ab"]
    assert figures[0] == figures[1] and figures[0]["x"] == 24.5
    # More samples: what is there is not drawn again, but the shard that was not full.
    drawn.clear()
    more = Samples(45, draw, [0] * 45)
    assert made.collect(more, None, Shards(10, tmp_path / "a")) and not drawn
    path = next((tmp_path / "a" / "pixels.features").glob("00002.npz"))
    path.write_bytes(path.read_bytes()[:-30])  # damaged
    assert made.collect(more, None, Shards(10, tmp_path / "a")) and drawn == [20]
    with Shards(10, tmp_path / "a").used():
        pass
    Shards(10, tmp_path / "a").remove()
    assert not (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_kept_features_serve_another_metric_of_other_outputs(tmp_path):
    calls = []

    def run(x, _):
        calls.append(len(x))
        return {"features": x.mean((1, 2)), "label": x[:, 0, 0, 0].astype(int)}

    net = Network("net", lambda: run, ("features", "label"), batch=8)
    x = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 3), np.uint8)
    shards, samples = Shards(8, tmp_path), of_array(x)
    one = Metric(lambda j: {"mean": float(j.samples.array().mean())}, ("features",), net)
    two = Metric(lambda j: {"label": float(j.samples.array("label")[-1])}, ("label",), net)
    for metrics in ({"one": one}, {"one": one, "two": two}, {"two": two}):
        made = Harness(metrics)
        assert made.collect(samples, None, shards)
        found = made.figures(samples, None, shards)
    assert found["label"] == x[-1, 0, 0, 0] and calls == [8, 8, 8] * 2


def test_kept_samples_are_not_drawn_again(tmp_path):
    rng, drawn = np.random.default_rng(0), []
    x = rng.uniform(-1.2, 1.2, (6, 2, 2, 1)).astype(np.float32)

    def draw(first, end):
        drawn.append(first)
        return x[first:end]

    samples = Samples(6, draw, [3, 1, 2, 0, 1, 1])
    shards = Shards(4, tmp_path / "s")
    for name in ("x", "y"):
        made = Harness({"a()": mean(name)})
        made.collect(samples, None, shards, keep="samples")
        found = made.figures(samples, None, shards)
        assert found["provenance"]["a()"]["quantised"]
        for path in (tmp_path / "s" / "pixels.features").glob("*.npz"):
            path.unlink()
    assert drawn == [0, 4]
    with np.load(tmp_path / "s" / "samples" / "00000.npz") as file:  # as ADM has them
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].tolist() == [3, 1, 2, 0]
        np.testing.assert_array_equal(file["arr_0"], np.round((x[:4].clip(-1, 1) + 1) * 127.5))
    assert found["y"] == pytest.approx(x.clip(-1, 1).mean(), abs=0.004)


@pytest.mark.parametrize(
    "metric, option",
    [
        ("energy(seed=-1)", "seed"),
        ("wasserstein(seed=-1)", "seed"),
        ("frechet(pixels, splits=0)", "splits"),
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
        selection.make((metric,), pipeline())


def test_a_judgement_that_stops_at_any_file_goes_on(tmp_path, monkeypatch):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    made, write, written = Harness({"a()": mean("x")}), Shards.write, []

    def once(self, name, number, arrays):
        write(self, name, number, arrays)
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(name)

    for size, stop in ((9, 0), (9, 1), (4, 0), (4, 1), (4, 2), (4, 3)):
        written.clear()
        place = Shards(size, tmp_path / f"{size}_{stop}")
        monkeypatch.setattr(Shards, "write", once)
        with pytest.raises(KeyboardInterrupt):
            made.collect(of_array(x), None, place)
        monkeypatch.setattr(Shards, "write", write)
        assert made.collect(of_array(x), None, place)
        assert made.figures(of_array(x), None, place)["x"] == pytest.approx(x.mean())
    for path in place.folder.rglob("*.npz"):  # any damaged file is made anew
        path.write_bytes(b"damaged")
        assert made.collect(of_array(x), None, place)
        assert made.figures(of_array(x), None, place)["x"] == pytest.approx(x.mean())


def test_shards_that_others_use_or_that_are_kept_are_not_removed(tmp_path):
    one, other = (Shards(4, tmp_path / "s") for _ in range(2))
    with one.used():
        one.write("a", 0, {"a": np.arange(3)})
        other.remove()
        assert one.rows("a", 0) == 3
    other.remove()
    assert not (tmp_path / "s").exists()
    with pytest.raises(FileNotFoundError), one.used():
        one.read("a", 0)  # errors in the block are not lost
    with one.used(keep=True):
        one.write("a", 0, {"a": np.arange(3)})
    other.remove()
    assert one.rows("a", 0) == 3


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"a")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"No space left .*00000\.npz"):
        Shards(4, tmp_path).write("a", 0, {"a": np.arange(3)})
    assert not list((tmp_path / "a").iterdir())


def test_what_a_metric_lacks_is_named():
    with pytest.raises(ValueError, match=r"needs a feature network: .*clip\("):
        selection.make(("clip_score()",), pipeline())
    with pytest.raises(ValueError, match=r"digits_svc takes \[N, 8, 8, 1\], got \(\d+, 2\)"):
        digits_svc()(np.zeros((4, 2), np.float32), [0] * 4, ("label",))


def test_weights_are_read_before_samples_are_drawn(tmp_path):
    path = tmp_path / "r.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))

    def broken():
        raise ValueError("other weights")

    net = Network("inception2015", broken)
    made = Harness(selection.make(("fid()",), None, "m", net), reference=str(path))
    with pytest.raises(ValueError, match="other weights"):
        made.evaluate(Samples(6, lambda *_: pytest.fail("samples are drawn")))


def test_statistics_of_another_size_are_refused_at_the_first_shard(tmp_path):
    path = tmp_path / "edm2.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    net = Network("inception2015", lambda: lambda x, _: {"features": x.mean((1, 2))})
    made = Harness(selection.make(("fid()",), None, "m", net), reference=str(path))
    x = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3), np.uint8)

    def draw(first, end):
        assert first == 0, "the second shard is drawn"
        return x[first:end]

    with pytest.raises(ValueError, match=r"edm2\.npz has statistics of 5 features, and incep.*3"):
        made.evaluate(Samples(6, draw), shard=2)
