"""MNIST and CIFAR-10 from original files, by download and from TFDS; TFDS sets of one's own."""

import gzip
import hashlib
import io
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from configs import base
from diffusion.config.data import make_source
from diffusion.data import image_source, mnist_cifar, tfds
from diffusion.data.sources import from_arrays

pytest.importorskip("tensorflow_datasets")
RNG = np.random.default_rng(0)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(s.to_bytes(4, "big") for s in array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Small files in place of the original ones, and a folder to download them into."""
    files, target = tmp_path / "server", tmp_path / "downloads"
    files.mkdir()
    digits, label = RNG.integers(0, 256, (3, 28, 28), np.uint8), np.array([3, 1, 4], np.uint8)
    for prefix in ("train", "t10k"):
        (files / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(digits))
        (files / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(label))
    photos = RNG.integers(0, 256, (6, 32, 32, 3), np.uint8)
    archive_name = "cifar-10-binary.tar.gz"
    with tarfile.open(files / archive_name, "w:gz") as archive:
        for k in range(6):
            record = bytes([k]) + photos[k].transpose(2, 0, 1).tobytes()
            name = "test_batch" if k == 5 else f"data_batch_{k + 1}"
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = len(record)
            archive.addfile(info, io.BytesIO(record))
    monkeypatch.setattr(mnist_cifar, "MNIST", files.as_uri() + "/")
    monkeypatch.setattr(mnist_cifar, "CIFAR10", files.as_uri() + "/")
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files.iterdir()}
    monkeypatch.setattr(mnist_cifar, "CIFAR10_FILES", {archive_name: sums.pop(archive_name)})
    monkeypatch.setattr(mnist_cifar, "MNIST_FILES", sums)
    return files, target, digits, photos


def test_original_files_are_downloaded_once(server, monkeypatch):
    files, target, digits, photos = server
    mnist = mnist_cifar.mnist("test", target)
    np.testing.assert_array_equal(np.round((mnist.all()["x"][..., 0] + 1) * 127.5), digits)
    assert mnist.all()["label"].tolist() == [3, 1, 4] and mnist.num_classes == 10
    assert sorted(f.name for f in target.iterdir()) == sorted(
        f.name for f in files.iterdir() if f.name.startswith("t10k")
    )
    train, test = (mnist_cifar.cifar10(split, target) for split in ("train", "test"))
    both = np.concatenate([train.all()["x"], test.all()["x"]])
    np.testing.assert_array_equal(np.round((both + 1) * 127.5), photos)
    assert train.all()["label"].tolist() == [0, 1, 2, 3, 4] and train.num_classes == 10
    for file in files.iterdir():
        file.unlink()
    assert len(mnist_cifar.cifar10("train", target)) == 5
    # Without a folder they go where downloads go.
    monkeypatch.setattr(mnist_cifar, "CACHE", target.parent / "cache")
    with pytest.raises(FileNotFoundError, match=r"cache/mnist/train-images"):
        mnist_cifar.mnist("train")


def test_a_download_that_fails_says_what_to_do(server):
    files, target, *_ = server
    (files / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        mnist_cifar.mnist("train", target)
    for part in ("train-labels-idx1-ubyte.gz is absent", "curl -LO file:", "--config.data.dir"):
        assert part in str(error.value)
    # All that are needed are named at once; the images came.
    assert str(error.value).count("curl -LO") == 3
    (files / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError):
        mnist_cifar.mnist("train", target / "deeper")
    assert not (target / "deeper").exists()


def test_other_content_is_refused_and_not_kept(server):
    files, target, *_ = server
    path = files / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="has other contents than expected"):
        mnist_cifar.mnist("train", target)
    assert not list(target.iterdir())


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((3, 3), np.uint8))[:-9])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        mnist_cifar.mnist("train", tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is damaged"):
        mnist_cifar.cifar10("train", tmp_path)


def test_a_set_of_ones_own_under_the_name_of_a_stock_set(tmp_path):
    """Prepared by us, read where a name is looked up in TFDS's folder; never with TensorFlow."""
    x = RNG.integers(0, 256, (5, 32, 32, 3), np.uint8)
    names = tuple("abcdefghij")
    parts = {
        split: from_arrays("set", x[rows], np.array([7, 0, 9, 1, 2])[rows], class_names=names)
        for split, rows in (("train", slice(0, 3)), ("test", slice(3, 5)))
    }
    path = tfds.prepare("cifar10", tmp_path, parts, 3)
    assert path == tmp_path / "cifar10" / "1.0.0"
    for split in ("train", "test"):
        by_name = image_source.resized(tfds.source("cifar10", split, tmp_path), (32, 32, 3))
        for source in (mnist_cifar.cifar10(split, tmp_path), by_name):
            for name, value in parts[split].all().items():
                np.testing.assert_array_equal(source.all()[name], value)
    assert tfds.source("cifar10", "train", tmp_path).class_names == names
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="exists already"):
        tfds.prepare("cifar10", tmp_path, parts, 3)
    with pytest.raises(ValueError, match="'My set' cannot be the name"):
        tfds.prepare("My set", tmp_path, parts, 3)
    with pytest.raises(ValueError, match="images of floats"):
        tfds.prepare("floats", tmp_path, {"train": from_arrays("f", np.zeros((2, 4, 4, 1)))}, 1)


def test_images_of_many_sizes_and_modes_survive_preparation(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "jpeg.jpg": (Image.fromarray(RNG.integers(0, 256, (9, 7, 3), np.uint8)), {}),
        "turned.jpg": (Image.fromarray(RNG.integers(0, 256, (6, 9, 3), np.uint8)), {"exif": exif}),
        "alpha.png": (Image.fromarray(RNG.integers(0, 256, (5, 5, 4), np.uint8)), {}),
        "grey.png": (Image.fromarray(RNG.integers(0, 256, (5, 8), np.uint8)), {}),
        "deep.png": (Image.fromarray(RNG.integers(0, 65536, (5, 6), np.uint16)), {}),
        "web.webp": (Image.fromarray(RNG.integers(0, 256, (9, 9, 3), np.uint8)), {}),
    }
    lines = []
    for i, (name, (image, options)) in enumerate(kinds.items()):
        image.save(folder / name, **options)
        lines.append(f'{{"file_name": "{name}", "text": "nr {i} ü"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    c = base.get_config().data
    c.update(name="folder", dir=str(folder), size=5, held_out=0.4)
    parts = {split: make_source(c, split) for split in ("train", "test")}
    tfds.prepare("own", tmp_path / "tfds", parts, 3)
    c.update(name="own", dir=str(tmp_path / "tfds"))
    for split, part in parts.items():
        again = make_source(c, split)
        assert again.captions == part.captions
        np.testing.assert_array_equal(again.all()["x"], part.all()["x"])
    c.size = 0
    with pytest.raises(ValueError, match=r"own, train, example \d+ \d x \d and .* set config"):
        make_source(c, "train")
    c.update(size=8, buckets="aspect(step=2)")
    assert len({part.shape for part in make_source(c, "train").buckets}) > 1


def test_a_set_without_a_test_split_gives_up_a_share(tmp_path):
    x = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    tfds.prepare("alone", tmp_path, {"train": from_arrays("set", x)}, 1)
    c = base.get_config().data
    c.update(name="alone", dir=str(tmp_path), size=1, held_out=0.2)
    parts = [make_source(c, split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [16, 4] and parts[0].num_classes == 0
    joined = np.concatenate([part.all()["x"].ravel() for part in parts])
    np.testing.assert_array_equal(np.round((joined + 1) * 127.5), np.arange(20))


@pytest.mark.parametrize(
    "name, message",
    [
        ("imagenet_resizd", r"'imagenet_resizd' is none of digits, .*Did you mean 'imagenet_res"),
        ("folders", "Did you mean 'folder'"),
        ("beans", r"beans is not prepared in(.|\n)*pip install tensorflow-cpu"),
    ],
)
def test_unknown_and_unprepared_names(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    c = base.get_config().data
    c.update(name=name, dir=str(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        make_source(c, "train")
    assert str(error.value).startswith(f"config.data.name={name!r}: ")
