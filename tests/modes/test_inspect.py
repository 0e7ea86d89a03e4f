"""Looking at data, preparing them, and training on aspect-ratio buckets, as main.py does."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import tiny_tokenizer

from configs import base, digits
from diffusion import pretrained
from diffusion.config import data, latents
from diffusion.config.data import make_source
from diffusion.config.experiment import build
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.modes import inspect, prepare
from diffusion.pretrained.models import shapes
from diffusion.training import optimizers
from diffusion.training.loop import fit

CAPTIONS = ("a red dog", "a big house at night", "the river", "a small green house on the river")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Captioned images of three shapes; two are equal, one is damaged, one is rotated."""
    root = tmp_path_factory.mktemp("scenes")
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        shape = [(40, 20), (20, 40), (32, 32)][i % 3]
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(root / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": CAPTIONS[i % 4]}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    (root / "09.png").write_bytes((root / "06.png").read_bytes())
    (root / "05.png").write_bytes((root / "05.png").read_bytes()[:500])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (20, 40), np.uint8)).save(root / "12.png", exif=exif)
    tiny_tokenizer().save_pretrained(root.parent / f"{root.name}_tokenizer")
    return root


def config(scenes, **fields):
    c = base.get_config()
    c.data.update({"name": "folder", "dir": str(scenes), "size": 16, "held_out": 0.2, **fields})
    c.data.tokenizer = str(scenes.parent / f"{scenes.name}_tokenizer")
    c.train.batch_size = 4
    return c


def test_inspect_tells_and_shows(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusion.modes.inspect.SECONDS", 0.1)
    monkeypatch.setattr(data, "CHECKED", tmp_path / "checked")
    c = config(scenes, tokens=6, buckets="aspect(step=4)", crop="random", flip=True)
    inspect.run(c, str(tmp_path))
    report = json.loads((tmp_path / "inspect.json").read_text())
    assert sum(report["examples"].values()) == 23
    (bad,) = [name for found in report["damaged"].values() for name in found]
    assert bad.endswith("05.png")
    # Width first; the damaged one was 32 x 32, and the rotated one stands upright.
    assert report["sizes"]["most_common"] == {"20 x 40": 8, "40 x 20": 8, "32 x 32": 7}
    assert report["modes"] == {"RGB": 22, "L rotated": 1}
    assert report["duplicates"]["groups"] == 1
    assert {Path(name).name for name in report["duplicates"]["first"][0]} == {"06.png", "09.png"}
    assert sum(b["examples"] for b in report["buckets"].values()) == report["examples"]["train"]
    assert set(report["buckets"]) == {"12 x 20", "16 x 16", "20 x 12"}
    train = make_source(config(scenes, on_error="skip").data, "train")
    lengths = [len(tiny_tokenizer()(text)["input_ids"]) for text in train.captions]
    tokens = report["captions"]["tokens"]
    assert (tokens["min"], tokens["max"]) == (min(lengths), max(lengths))
    cut = np.mean(np.array(lengths) > 6)
    assert report["captions"]["cut"] == pytest.approx(cut) and 0 < cut < 1
    assert report["captions"]["unknown"] == 0
    # Noise of even grey levels: mean 0, standard deviation sqrt(1 / 3), less where it is resized.
    assert np.abs(report["pixels"]["mean"]).max() < 0.1
    assert 0.2 < report["pixels"]["std_of_all"] < 0.6 and report["images_per_second"] > 0
    page = Image.open(tmp_path / "inspect.png")
    assert page.mode == "RGB" and min(page.size) > 300
    out = capsys.readouterr().out
    for part in (
        "05.png",
        "cut at 6",
        ": 1 cannot be decoded; training stops",
        "occur several times",
        "12 x 20",
    ):
        assert part in out


@pytest.mark.parametrize("name", ["digits", "points"])
def test_inspect_of_data_that_are_no_files(tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr("diffusion.modes.inspect.SECONDS", 0.05)
    c = digits.get_config()
    c.data.name = name
    inspect.run(c, str(tmp_path))
    report = json.loads((tmp_path / "inspect.json").read_text())
    if name == "digits":
        assert report["classes"]["count"] == 10
        assert sum(report["classes"]["examples"].values()) == 1297
        x = make_source(c.data, "train").all()["x"]
        assert report["pixels"]["std_of_all"] == pytest.approx(x.std(), abs=0.01)
        assert report["duplicates"]["groups_between_splits"] == 0
    assert (tmp_path / "inspect.png").stat().st_size > 5000
    assert "config.data.std" not in capsys.readouterr().out or name == "points"


def test_prepare_makes_a_set_that_is_read_by_name(scenes, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(data, "CHECKED", tmp_path / "checked")
    c = config(scenes)
    with pytest.raises(ValueError, match=r"05\.png cannot be read"):
        prepare.run(c, str(tmp_path / "sets" / "scenes"))
    c.data.on_error = "skip"
    prepare.run(c, str(tmp_path / "sets" / "scenes"))
    said = capsys.readouterr().out
    assert "--config.data.name=scenes" in said and f"--config.data.dir={tmp_path}/sets" in said
    again = config(scenes, name="scenes", dir=str(tmp_path / "sets"))
    for split in ("train", "test"):
        a, b = make_source(c.data, split).all(), make_source(again.data, split).all()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    with pytest.raises(ValueError, match=r"--workdir=.*exists already"):
        prepare.run(c, str(tmp_path / "sets" / "scenes"))


@pytest.fixture(scope="module")
def bucketed(scenes, tmp_path_factory):
    """Of a tiny text-to-image run on cached latents in three shapes."""
    folder = tmp_path_factory.mktemp("bucketed")
    net = AutoencoderKL(
        widths=(8, 8), blocks=1, latent_channels=2, mid_attention=False, norm_groups=4
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes(net))
    pretrained.save(folder / "autoencoder", net, params)
    c = config(scenes, buckets="aspect(step=4)", tokens=8, on_error="skip")
    c.data.autoencoder, c.data.cache = str(folder / "autoencoder"), str(folder / "cache")
    c.model.name = "dit"
    c.model.dit.update(width=16, depth=1, heads=2, patch=2, cross_attention=True, pooled=True)
    c.model.text.update(width=16, depth=1, heads=2)
    c.optimizer.update(name="sgd", warmup=0, clip_norm=0.0)
    c.train.update(steps=6, log_every=1, batch_size=4)
    c.sampler.update(steps=2, batch_size=4)
    c.samples.update(columns=2, count=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHECKED", folder / "checked")
        latents.compute(c.data, lambda split: data.make_images(c.data, split))
        yield c


def test_latents_in_buckets(bucketed):
    train, images = make_source(bucketed.data, "train"), data.make_images(bucketed.data, "train")
    assert train.shape == (8, 8, 2)
    assert {part.shape for part in train.buckets} == {(6, 10, 2), (8, 8, 2), (10, 6, 2)}
    encode = partial(latents.encode, bucketed.data.autoencoder)
    for part, image in zip(train.buckets, images.buckets):
        every = np.arange(len(part))
        found = part.read(every)
        np.testing.assert_array_equal(found["tokens"], train.encode(part.captions)["tokens"])
        expected = encode(image.read(every)["x"])
        np.testing.assert_allclose(found["x"], expected["x"], atol=1e-5)
        np.testing.assert_allclose(found["x_std"], expected["x_std"], atol=1e-5)
    # Of the whole, squares, which are computed when they are asked for.
    some = np.array([3, 0])
    expected = encode(images.read(some)["x"])["x"]
    np.testing.assert_allclose(train.read(some)["x"], expected, atol=1e-5)


def test_training_takes_every_bucket(bucketed, tmp_path):
    """The step is compiled once more for each shape; in half precision they only travel."""
    c = bucketed.copy_and_resolve_references()
    c.data.update(tokenizer="", autoencoder="", dtype="bfloat16")
    train, seen = data.make_images(c.data, "train"), []

    def loss(params, context, batch, key):
        seen.append((batch["x"].shape, batch["x"].dtype))
        return jnp.mean((params["mean"] - batch["x"]) ** 2), {}

    def init(key, batch):
        return {"mean": jnp.zeros(3)}

    def batches(start):
        for batch in data.batches(c, train, start):
            assert batch["x"].dtype == jnp.bfloat16
            yield batch

    state = fit(
        objective=SimpleNamespace(init=init, loss=loss, step=None),
        optimizer=optimizers.make("sgd", 0.1, steps=6),
        emas={},
        batches=batches,
        steps=6,
        workdir=tmp_path,
        devices=jax.local_devices()[:1],
    )
    assert int(state.step) == 6
    assert {shape[1:] for shape, _ in seen} == {(20, 12, 3), (16, 16, 3), (12, 20, 3)}
    assert {dtype for _, dtype in seen} == {jnp.dtype("float32")}


def test_a_network_that_does_not_take_a_bucket_is_named(bucketed):
    c = bucketed.copy_and_resolve_references()
    c.model.dit.patch = 4
    with pytest.raises(ValueError, match=r"bucket (6 x 10|10 x 6) of config\.data\.buckets"):
        build(c)
    c = bucketed.copy_and_resolve_references()
    c.data.crop = "random"
    with pytest.raises(ValueError, match=r"config\.data\.crop='random': latents are computed once"):
        build(c)


def test_workers_read_what_threads_read(scenes):
    """Two spawned processes, of a folder in buckets; and their error at a damaged file."""
    c = config(scenes, crop="random", flip=True, buckets="aspect(step=4)")
    train = make_source(c.data, "train")
    here, reading = data.batches(c, train, 0), None
    c.data.update(workers=2, threads=1)
    reading, count = data.batches(c, train, 0), 0
    with pytest.raises(ValueError, match=r"05\.png cannot be read"):
        for batch in reading:
            other = next(here)
            assert set(batch) == set(other)
            for name in batch:
                np.testing.assert_array_equal(batch[name], other[name])
            count += 1
    assert count > 0
    with pytest.raises(ValueError, match=r"05\.png cannot be read"):
        next(here)
