"""Sources: contents, ranges, splits and clear errors."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.data import mnist_cifar, sources, tfds

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def needs(path: str):
    return pytest.mark.skipif(not (REAL / path).exists(), reason=f"real data {path} is absent")


def test_digits_split_is_stratified_disjoint_and_complete():
    from sklearn.datasets import load_digits

    train, test = sources.digits("train"), sources.digits("test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.shape == (8, 8, 1)
    assert train.num_classes == 10
    a, b = train.all(), test.all()
    both = np.concatenate([a["x"], b["x"]]).reshape(1797, 64)
    original = load_digits().data / 8 - 1
    # As multisets the two splits are exactly the original.
    np.testing.assert_array_equal(
        both[np.lexsort(both.T)], original[np.lexsort(original.T)].astype(np.float32)
    )
    share = [np.bincount(s["label"], minlength=10) / len(s["label"]) for s in (a, b)]
    np.testing.assert_allclose(share[0], share[1], atol=0.003)
    np.testing.assert_array_equal(sources.digits("test").all()["x"], b["x"])


def test_digits_range_and_types():
    data = sources.digits("train").all()
    assert data["x"].dtype == np.float32
    assert data["label"].dtype == np.int32
    assert (data["x"].min(), data["x"].max()) == (-1, 1)


def test_uint8_maps_to_the_unit_range_exactly():
    source = sources.from_arrays("grey", np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1))
    x = source.all()["x"].ravel()
    assert (x[0], x[255]) == (-1, 1)
    np.testing.assert_array_equal(np.round((x + 1) * 127.5), np.arange(256))


def test_item_is_a_row_of_the_batch_and_index_is_checked():
    source = sources.digits("test")
    batch = source.read(np.array([7, 3]))
    np.testing.assert_array_equal(source[3]["x"], batch["x"][1])
    assert source[7]["label"] == batch["label"][0]
    assert source[3]["label"].shape == ()
    for bad in (-1, 500):
        with pytest.raises(IndexError, match=r"0\.\.499"):
            source[bad]


def test_wrong_split_names_the_valid_ones():
    with pytest.raises(ValueError, match="'train' and 'test', got 'valid'"):
        sources.digits("valid")


def _write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(s.to_bytes(4, "big") for s in array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_mnist_reads_idx_files_and_pads(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    _write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    _write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([3, 1, 4, 1, 5], np.uint8))
    plain, padded = (mnist_cifar.mnist("test", tmp_path, padding=p) for p in (0, 2))
    assert (plain.shape, padded.shape) == ((28, 28, 1), (32, 32, 1))
    assert plain.num_classes == 10
    x = padded.all()["x"]
    np.testing.assert_array_equal(x[:, 2:30, 2:30], plain.all()["x"])
    assert np.all(x[:, [0, 1, 30, 31]] == -1)
    assert plain.all()["label"].tolist() == [3, 1, 4, 1, 5]
    np.testing.assert_allclose(plain[2]["x"][..., 0], images[2] / 127.5 - 1, atol=1e-6)


def test_mnist_rejects_another_format(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(ValueError, match="not an idx file"):
        mnist_cifar.mnist("train", tmp_path)


def _jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return file.getvalue()


def test_cifar10_reads_the_jpeg_copy_and_says_that_it_is_lossy(tmp_path):
    flat = np.broadcast_to(np.array([0, 128, 255], np.uint8)[:, None, None, None], (3, 32, 32, 3))
    parts = [_jpeg(image) for image in flat]
    arrays = {
        "test_jpeg": np.frombuffer(b"".join(parts), np.uint8),
        "test_offsets": np.cumsum([0] + [len(p) for p in parts]),
        "test_labels": np.array([2, 0, 1], np.uint8),
        "classes": np.array(["plane", "car", "bird"]),
    }
    np.savez(tmp_path / "cifar10_jpegq75.npz", **arrays)
    source = mnist_cifar.cifar10("test", tmp_path)
    assert "lossy" in source.note
    assert source.class_names == ("plane", "car", "bird")
    data = source.all()
    np.testing.assert_allclose(data["x"], flat / 127.5 - 1, atol=0.02)
    assert data["label"].tolist() == [2, 0, 1]


def test_tfds_not_prepared_says_how(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    # As on a machine without TensorFlow; with it the set would be downloaded.
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install tensorflow-cpu(.|\n)*'mnist'"):
        tfds.source("mnist", "train", tmp_path)


def test_latents_are_scaled(tmp_path):
    latents = np.random.default_rng(0).standard_normal((6, 4, 4, 4)).astype(np.float16)
    np.savez(tmp_path / "cache.npz", latents=latents, label=np.array([0, 1, 2, 3, 4, 5]))
    source = sources.latents(tmp_path / "cache.npz", scale=0.18215, num_classes=1000)
    assert source.shape == (4, 4, 4)
    assert source.num_classes == 1000
    batch = source.read(np.array([5, 0]))
    assert batch["x"].dtype == np.float32
    np.testing.assert_allclose(batch["x"], latents[[5, 0]].astype(np.float32) * 0.18215, rtol=1e-6)
    assert batch["label"].tolist() == [5, 0]


def test_latents_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz with 'latents'"):
        sources.latents(tmp_path / "none.npz")
    np.savez(tmp_path / "a.npz", latents=np.zeros((2, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"lacks \['label'\]"):
        sources.latents(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", latents=np.zeros((2, 4, 4, 4), np.uint8), label=np.zeros(2))
    with pytest.raises(ValueError, match="must be float"):
        sources.latents(tmp_path / "b.npz")


def test_labels_must_fit():
    with pytest.raises(ValueError, match="3 examples but 2 labels"):
        sources.from_arrays("bad", np.zeros((3, 2)), np.zeros(2))


def test_points_have_no_labels_and_are_fixed_by_the_seed():
    a, b = sources.points("two_moons", 50, seed=3), sources.points("two_moons", 50, seed=3)
    assert a.shape == (2,)
    assert a.num_classes == 0
    assert set(a.all()) == {"x"}
    np.testing.assert_array_equal(a.all()["x"], b.all()["x"])


@needs("mnist/t10k-images-idx3-ubyte.gz")
def test_real_mnist_has_its_published_statistics():
    data = mnist_cifar.mnist("test", REAL / "mnist").all()
    assert data["x"].shape == (10_000, 28, 28, 1)
    np.testing.assert_allclose((data["x"] / 2 + 0.5).mean(), 0.1325, atol=1e-4)
    assert np.bincount(data["label"]).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


@needs("cifar10/cifar10_jpegq75.npz")
def test_real_cifar10_has_its_published_statistics():
    source = mnist_cifar.cifar10("test", REAL / "cifar10")
    data = source.all()
    assert data["x"].shape == (10_000, 32, 32, 3)
    assert np.bincount(data["label"]).tolist() == [1000] * 10
    mean = (data["x"] / 2 + 0.5).mean((0, 1, 2))
    np.testing.assert_allclose(mean, [0.4942, 0.4851, 0.4504], atol=3e-3)


def test_grey_levels_are_those_that_occur():
    """x lies on k 2 / (levels - 1) - 1; floats have none unless they are named."""
    for source in (
        sources.digits("test"),
        sources.from_arrays("a", np.arange(256, dtype=np.uint8)),
    ):
        k = (source.all()["x"].astype(np.float64) + 1) * (source.levels - 1) / 2
        np.testing.assert_allclose(k, np.round(k), atol=1e-4)
        assert k.min() == 0 and k.max() == pytest.approx(source.levels - 1)
    assert sources.from_arrays("b", np.zeros((2, 1))).levels == 0
