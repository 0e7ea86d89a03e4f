"""NumPy files: contents, splits, mapping, and errors that name the array."""

import pickle

import numpy as np
import pytest

from configs import base
from diffusion.config.data import make_source
from diffusion.data import arrays

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (40, 6, 5, 3), np.uint8)
LABEL = np.arange(40) % 4


def config(path, **fields):
    c = base.get_config().data
    c.update({"name": "arrays", "dir": str(path), **fields})
    return c


def both(path, **fields):
    return [make_source(config(path, **fields), split) for split in ("train", "test")]


def save(path, kind, **values):
    if kind == "npz":
        np.savez(path.with_suffix(".npz"), **values)
        return path.with_suffix(".npz")
    path.mkdir()
    for name, value in values.items():
        np.save(path / f"{name}.npy", value)
    return path


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_bytes_labels_and_captions(tmp_path, kind):
    captions = np.array([f"nr {i}" for i in range(40)])
    path = save(tmp_path / "set", kind, images=BYTES, label=LABEL, caption=captions)
    train, test = both(path, held_out=0.2)
    assert train.shape == (6, 5, 3) and train.num_classes == 4
    assert len(train) + len(test) == 40 and len(test) >= 2
    numbers = [int(c[3:]) for c in train.captions + test.captions]
    assert sorted(numbers) == list(range(40))
    for source in (train, test):
        batch, own = source.all(), [int(c[3:]) for c in source.captions]
        np.testing.assert_array_equal(np.round((batch["x"] + 1) * 127.5), BYTES[own])
        np.testing.assert_array_equal(batch["label"], LABEL[own])
        assert batch["x"].dtype == np.float32 and batch["label"].dtype == np.int32


def test_files_of_npy_are_mapped_also_in_another_process(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, BYTES)
    source = make_source(config(path), "train")
    data = pickle.dumps(source.read)
    assert len(data) < 2000 < BYTES.nbytes
    np.testing.assert_array_equal(
        pickle.loads(data)(np.array([3, 1]))["x"], source.read(np.array([3, 1]))["x"]
    )


def test_splits_beside_each_other(tmp_path):
    np.savez(tmp_path / "train.npz", x=BYTES[:30], y=LABEL[:30])
    np.savez(tmp_path / "test.npz", x=BYTES[30:32], y=[0, 1])
    train, test = both(tmp_path)
    assert (len(train), len(test), test.num_classes) == (30, 2, 4)
    np.savez(tmp_path / "test.npz", x=BYTES[30:32], y=[0, 4])
    with pytest.raises(ValueError, match=r"test\.npz: y has 4, which .*train\.npz lacks"):
        both(tmp_path)


def test_floats_are_taken_as_they_are(tmp_path):
    x = RNG.uniform(-1, 1, (20, 4, 4)).astype(np.float64)
    np.save(tmp_path / "x.npy", x)
    source = make_source(config(tmp_path / "x.npy"), "train")
    assert source.shape == (4, 4, 1) and source.levels == 0
    kept = source.all()["x"]
    assert kept.dtype == np.float32
    assert all(np.any(np.all(x.astype(np.float32) == k[..., 0], axis=(1, 2))) for k in kept)
    with pytest.raises(ValueError, match=r"config\.data\.size=8.*floats"):
        make_source(config(tmp_path / "x.npy", size=8), "train")


def test_a_value_out_of_range_is_found_when_it_is_read(tmp_path):
    x = RNG.uniform(-1, 1, (400, 2, 2)).astype(np.float32)
    x[399, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", x)
    sources = both(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy, images .* has values nan to nan"):
        for source in sources:
            source.all()


def test_sizes_channels_and_opacity(tmp_path):
    np.save(tmp_path / "x.npy", BYTES)
    assert make_source(config(tmp_path / "x.npy", size=4), "train").all()["x"].shape[1:] == (
        4,
        4,
        3,
    )
    assert make_source(config(tmp_path / "x.npy", channels=1), "train").shape == (6, 5, 1)
    opacity = np.zeros((4, 2, 2, 4), np.uint8)
    np.save(tmp_path / "a.npy", opacity)
    source = make_source(config(tmp_path / "a.npy", background=(0, 255, 0)), "train")
    np.testing.assert_array_equal(source[0]["x"][0, 0], [-1, 1, -1])


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(pictures=BYTES), r"set\.npz has no x, image or images; it has pictures"),
        (dict(x=BYTES[:, 0, 0]), r"x has the shape \(40, 3\)"),
        (dict(x=BYTES.transpose(0, 3, 1, 2)), r"channels first.*transpose"),
        (dict(x=BYTES.astype(np.int64)), "x is int64; expected uint8, or floats"),
        (dict(x=BYTES[:0]), "x has the shape"),
        (dict(x=np.full((9, 2, 2), 3.0)), "values 3 to 3"),
        (dict(x=np.full((9, 2, 2), np.nan)), "values nan to nan"),
        (dict(x=RNG.uniform(0, 1, (9, 2, 2))), r"lies in \[0.*2 \* x - 1"),
        (dict(x=BYTES, label=LABEL[:5]), r"label has the shape \(5,\); expected \(40,\)"),
        (dict(x=BYTES, label=LABEL - 1), "label must be whole numbers from 0"),
        (dict(x=BYTES, label=LABEL * 1.0), "label must be whole numbers from 0"),
        (dict(x=BYTES, caption=np.array(["a"])), "caption must be 40 strings"),
        (dict(x=BYTES, caption=LABEL), "caption must be 40 strings"),
        (dict(x=np.array([{}])), "set.npz cannot be read"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, values, message):
    np.savez(tmp_path / "set.npz", **values)
    with pytest.raises(ValueError, match=message):
        arrays.source("set", tmp_path / "set.npz", "train")


def test_absent_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz, an \.npy, or a folder"):
        arrays.source("set", tmp_path / "absent.npz", "train")
    (tmp_path / "set.npz").write_bytes(b"PK not an archive")
    (tmp_path / "set.npy").write_bytes(b"\x93NUMPY")
    for name in ("set.npz", "set.npy"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            arrays.source("set", tmp_path / name, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it has none"):
        arrays.source("set", tmp_path / "empty", "train")
