"""Judging by command: samples that are drawn or come from files, against references."""

import json

import jax
import numpy as np
import pytest
from commands import assert_names, command, first_sentence, newest, succeed

from diffusion.config import judging
from diffusion.data import sources
from diffusion.models.inception import Inception
from diffusion.pretrained import files, weights
from diffusion.pretrained.networks import inception

QUICK = ["--config.train.steps=4", "--config.train.log_every=2", "--config.optimizer.warmup=0"]
QUICK += ["--config.model.unet.widths=(8,8)", "--config.model.unet.norm_groups=4"]
QUICK += ["--config.model.unet.attention=0", "--config.model.unet.mid_attention=0"]
QUICK += ["--config.optimizer.name=sgd", "--config.sampler.steps=2"]
DIGITS = "configs/digits.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("judging")


@pytest.fixture(scope="module")
def run(place):
    """A run that chose among its checkpoints by a metric of samples."""
    best = ["--config.train.validate_every=2", "--config.train.checkpoint_every=2"]
    best += ["--config.train.validation_metrics=frechet(pixels)", "--config.train.best=fd_pixels"]
    best += ["--config.train.validation_samples=20", "--config.train.keep_best=1"]
    more = ["--config.evaluation.count=30", f"--workdir={place / 'run'}"]
    succeed(*QUICK, *best, *more, config=DIGITS)
    return place / "run"


@pytest.fixture(scope="module")
def reference(place):
    printed = succeed(
        "--mode=reference",
        f"--workdir={place / 'references'}",
        "--config.evaluation.features=pixels",
        "--config.reference.examples=200",
        "--config.evaluation.shard=300",
        config=DIGITS,
    )
    assert "1297 examples of digits_train in" in printed
    path = place / "references" / "digits_train_8x8_pixels.npz"
    assert list(path.parent.iterdir()) == [path]
    return path


def evaluate(workdir, *arguments, config=None):
    """The figures, and what was printed."""
    printed = succeed("--mode=evaluate", f"--workdir={workdir}", *arguments, config=config)
    folder = newest(workdir / "evaluations")
    return json.loads((folder / "evaluation.json").read_text()), printed, folder


def test_training_chooses_by_one_half_and_is_judged_by_the_other(run):
    judged = json.loads((run / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if "validation_loss" in line]
    assert len(chosen) == 2 and all("fd_pixels_half_real" in line for line in chosen)
    assert judged["recognised_real_count"] == 250
    names = {p["reference"]["name"] for s, p in judged["provenance"].items() if "digits_svc" in s}
    assert names == {"digits test"} and (run / "memorisation.png").stat().st_size > 0
    found, printed, _ = evaluate(run, "--config.sampler.checkpoint=best")
    assert found["recognised_real_count"] == 250 and "recognised: " in printed
    validation, _, _ = evaluate(
        run,
        "--config.evaluation.reference=validation",
        "--config.evaluation.metrics=frechet(pixels)",
    )
    about = [v["provenance"]["frechet(pixels)"]["reference"] for v in (found, validation)]
    assert about[0]["checksum"] != about[1]["checksum"]


def test_a_reference_has_the_data_sets_statistics(reference):
    x = sources.digits("train").all()["x"].reshape(1297, 64).astype(np.float64)
    with np.load(reference) as file:
        np.testing.assert_allclose(file["mu"], x.mean(0), atol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(x.T), atol=1e-10)
        assert file["arr_0"].shape == (200, 8, 8, 1) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].shape == (200,) and file["feats"].shape == (200, 64)


def test_samples_are_judged_again_from_their_files(run, reference, place):
    metrics = f"--config.evaluation.metrics=frechet(pixels, reference='{reference}')"
    count = ["--config.evaluation.count=30", "--config.evaluation.shard=12"]
    drawn, printed, _ = evaluate(run, metrics, *count, "--config.evaluation.keep=samples")
    assert "fd_pixels: " in printed
    kept = next((run / "shards").iterdir()) / "samples"
    assert [path.name for path in sorted(kept.iterdir())] == [f"{i:05d}.npz" for i in range(3)]
    provenance = drawn["provenance"][f"frechet(pixels, reference='{reference}')"]
    assert provenance["resolution"] == [8, 8, 1] and provenance["count"] == 30
    assert provenance["reference"]["statistics_of"] == 1297
    given = [f"--config.evaluation.samples={kept}", metrics, "--config.evaluation.count=0"]
    found, _, _ = evaluate(place / "elsewhere", *given)
    assert found["fd_pixels"] == pytest.approx(drawn["fd_pixels"], rel=1e-6)
    assert "data" not in found["settings"] and found["settings"]["samples"]["path"] == str(kept)
    for shape in ("sampler.steps=3", "samples.labels=3", "sampler.seed=2"):  # nothing is drawn
        error, _ = command("--mode=evaluate", *given, f"--config.{shape}", config=None)
        assert_names(error, f"config.{shape.split('=')[0]}", "config.evaluation.samples")


def test_features_of_another_model_are_not_taken(run, monkeypatch):
    """A run that was trained anew in the same place begins its shards anew."""
    options = ["--config.evaluation.keep=features", "--config.evaluation.count=20"]
    options += ["--config.evaluation.metrics=frechet(pixels)", "--config.sampler.seed=9"]
    before = {*(run / "shards").iterdir()}
    evaluate(run, *options)
    first = {*(run / "shards").iterdir()} - before
    evaluate(run, *options)
    assert {*(run / "shards").iterdir()} - before == first and len(first) == 1
    changed = lambda params: fingerprint({k: v for k, v in params.items() if k == "other"})
    fingerprint = judging.fingerprint
    monkeypatch.setattr(judging, "fingerprint", changed)
    evaluate(run, *options)
    assert len({*(run / "shards").iterdir()} - before) == 2


def test_a_fingerprint_is_of_every_array():
    params = {"a": np.zeros((100, 100), np.float32), "b": {"c": np.ones(3)}}
    own = judging.fingerprint(params)
    assert own == judging.fingerprint(params) and len(own) == 16
    for place in (0, -1):
        other = {"a": params["a"].copy(), "b": params["b"]}
        other["a"].flat[place] = 1e-6
        assert judging.fingerprint(other) != own
    assert judging.fingerprint(params | {"b": {"d": np.ones(3)}}) != own


def test_kept_samples_stay_and_are_judged_again(run):
    """Metrics that keep nothing find the samples, go on with them and leave them there."""
    options = ["--config.evaluation.shard=12", "--config.sampler.seed=6"]
    before = {*(run / "shards").iterdir()} if (run / "shards").exists() else set()
    first = ["--config.evaluation.count=20", "--config.evaluation.metrics=frechet(pixels)"]
    evaluate(run, *options, *first, "--config.evaluation.keep=samples")
    (folder,) = {*(run / "shards").iterdir()} - before
    kept = {path: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}
    second = ["--config.evaluation.count=30", "--config.evaluation.metrics=kid(pixels)"]
    found, _, _ = evaluate(run, *options, *second)
    assert {*(run / "shards").iterdir()} - before == {folder}
    assert len([*(folder / "samples").iterdir()]) == 3  # the rest is drawn and kept as well
    assert min(kept) in kept and min(kept).stat().st_mtime_ns == kept[min(kept)]
    assert found["provenance"]["kid(pixels)"]["quantised"]


def test_other_prompts_in_the_same_file_are_other_samples(run, place):
    asked = place / "labels.txt"
    options = ["--config.evaluation.count=20", "--config.evaluation.metrics=frechet(pixels)"]
    options += [f"--config.samples.labels=@{asked}", "--config.evaluation.keep=features"]
    figures = []
    for text in ("3\n4\n", "5\n6\n"):
        asked.write_text(text)
        found, _, folder = evaluate(run, *options)
        figures.append((found["fd_pixels"], folder))
        assert found["settings"]["samples"]["labels"] == text.split()
    assert figures[0] != figures[1]


def test_fid_by_command(place):
    """The README's commands, with random weights of Inception and ten pictures."""
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), np.zeros((1, 75, 75, 3)))["params"]
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "kernel":  # so that signals stay as strong from layer to layer
            std = np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
            return std * rng.standard_normal(leaf.shape, np.float32)
        low, high = {"scale": (0.7, 1.3), "running_var": (0.5, 1.5)}.get(path[-1].key, (-0.1, 0.1))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    leaves = jax.tree_util.tree_map_with_path(fill, shapes)
    weights_file = place / "inception.safetensors"
    files.write_file(weights_file, weights.save_params(inception.NAMES, leaves))
    features = f"--config.evaluation.features=inception('{weights_file}')"
    for name, seed in (("real", 1), ("fake", 2)):
        draw = np.random.default_rng(seed)
        np.savez(place / f"{name}.npz", arr_0=draw.integers(0, 256, (10, 32, 32, 3), np.uint8))
    succeed(
        "--mode=reference",
        f"--workdir={place / 'fid'}",
        f"--config.evaluation.samples={place / 'real.npz'}",
        features,
        config=None,
    )
    made = place / "fid" / "real_32x32_inception2015.npz"
    metrics = "fid(), sfid(), inception_score(), kid(), precision_recall()"
    found, printed, _ = evaluate(
        place / "fid",
        f"--config.evaluation.samples={place / 'fake.npz'}",
        "--config.evaluation.count=0",
        features,
        f"--config.evaluation.reference={made}",
        f"--config.evaluation.metrics={metrics}",
    )
    assert found["fid_inception2015"] > 0 and found["sfid_inception2015"] > 0
    assert 1 <= found["is_inception2015"] <= 10 and found["fid_inception2015_count"] == 10
    assert "10 samples are too few" in printed and "kid_inception2015: " in printed
    about = found["provenance"]["fid()"]
    assert about["weights"] and about["preparation"].startswith("TF-1 bilinear")
    again, _, _ = evaluate(
        place / "fid",
        f"--config.evaluation.samples={place / 'real.npz'}",
        "--config.evaluation.count=0",
        features,
        f"--config.evaluation.reference={made}",
        "--config.evaluation.metrics=fid()",
    )
    assert again["fid_inception2015"] < 1e-6 * found["fid_inception2015"]


def test_parts_are_made_apart_and_joined(run):
    options = ["--config.evaluation.shard=10", "--config.evaluation.count=30"]
    options += ["--config.sampler.seed=5", "--config.evaluation.metrics=frechet(pixels)"]
    whole, _, folder = evaluate(run, *options)
    before = (folder / "evaluation.json").read_text()
    (folder / "evaluation.json").unlink()
    for i in range(2):
        printed = succeed(
            "--mode=evaluate",
            f"--workdir={run}",
            *options,
            f"--config.evaluation.part=({i},3)",
            config=None,
        )
        assert "is done" in printed and not (folder / "evaluation.json").exists()
    joined, _, _ = evaluate(run, *options, "--config.evaluation.part=(2,3)")
    assert joined == whole and (folder / "evaluation.json").read_text() == before


@pytest.mark.parametrize(
    "best, right", [("recognised", "-recognised"), ("-fd_pixels", "fd_pixels")]
)
def test_the_worst_is_not_kept(place, best, right):
    error, _ = command(
        f"--workdir={place / 'worst'}",
        "--config.train.keep_best=1",
        f"--config.train.best={best}",
        config=DIGITS,
    )
    assert_names(error, f"config.train.best='{best}'", f"write '{right}'")
    assert not (place / "worst").exists()


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["evaluation.metrics=fid()"], ["fid()", "config.evaluation.features", "inception("]),
        (["evaluation.metrics=frechet()", "evaluation.features=pixls"], ["'pixls'", "'pixels'"]),
        (
            ["evaluation.metrics=frechet(pixels)", "evaluation.reference=no.npz"],
            ["config.evaluation.reference='no.npz'", "no such file", "test, validation"],
        ),
        (
            ["evaluation.metrics=frechet(pixels)", "evaluation.reference="],
            ["config.evaluation.reference=''", "train, test"],
        ),
        (
            ["evaluation.features=clip('/no/such')"],
            ["config.evaluation.features=", "no such folder"],
        ),
        (["evaluation.metrics=fid(pixels)"], ["fid(reference=a Network)", "expected str"]),
        (["evaluation.samples=no.npz"], ["config.evaluation.samples='no.npz'", "no such file"]),
        (["evaluation.part=(3,3)"], ["config.evaluation.part=(3, 3)", "(0, 4)"]),
        (["evaluation.keep=pictures"], ["config.evaluation.keep", "samples"]),
        (["evaluation.count=1"], ["two samples"]),
        (["evaluation.metrics=()"], ["config.evaluation.metrics is empty"]),
        (["reference.split=train"], ["config.reference.split", "reference"]),
    ],
)
def test_mistakes(run, arguments, names):
    given = [f"--config.{argument}" for argument in arguments]
    error, _ = command("--mode=evaluate", f"--workdir={run}", *given, config=None)
    assert_names(error, *names)
    left = list((run / "evaluations").rglob("*.partial")) if (run / "evaluations").exists() else []
    assert not left


def test_mistakes_in_references(run, reference, place):
    mode = ["--mode=reference", f"--workdir={place / 'r'}"]
    error, _ = command(*mode, config=DIGITS)
    assert_names(error, "config.evaluation.features=''", "feature network")
    error, _ = command(*mode, "--config.evaluation.features=digits_svc", config=DIGITS)
    assert_names(error, "config.evaluation.features='digits_svc'")
    error, _ = command(*mode, config=None)
    assert "--config" in first_sentence(error)
    printed = succeed(
        *mode[:1],
        f"--workdir={place / 'few'}",
        "--config.evaluation.features=pixels",
        "--config.reference.examples=0",
        config=DIGITS,
    )
    small = place / "few" / "digits_train_8x8_pixels.npz"
    assert "1297 examples" in printed and small.stat().st_size < 40_000  # statistics alone
    error, _ = command(
        "--mode=evaluate",
        f"--workdir={run}",
        f"--config.evaluation.metrics=kid(pixels, '{small}')",
        config=None,
    )
    assert_names(error, "kid(pixels", "statistics only", "feats or pictures")
    colours = place / "colours.npz"
    np.savez(colours, arr_0=np.full((4, 8, 8, 3), 9, np.uint8))
    error, _ = command(
        "--mode=evaluate",
        f"--workdir={place / 'w'}",
        f"--config.evaluation.samples={colours}",
        "--config.evaluation.count=0",
        f"--config.evaluation.metrics=frechet(pixels, '{reference}')",
        config=None,
    )
    assert_names(error, "[N, 8, 8, 1]", "(4, 8, 8, 3)")
    np.savez(place / "wide.npz", arr_0=np.full((4, 8, 16, 1), 9, np.uint8))
    error, _ = command(
        "--mode=evaluate",
        f"--workdir={place / 'w'}",
        f"--config.evaluation.samples={place / 'wide.npz'}",
        "--config.evaluation.count=0",
        f"--config.evaluation.metrics=frechet(pixels, '{reference}')",
        config=None,
    )
    assert_names(error, "[N, 8, 8, 1]", "(4, 8, 16, 1)")
