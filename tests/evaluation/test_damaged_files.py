"""Files of samples, references and graphs that are damaged or mean something else."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation import npz, references, sample_files
from diffusion.evaluation.moments import moments
from diffusion.evaluation.networks.network import Network
from diffusion.pretrained.tensorflow_graph import constants

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 4, 4, 3), np.uint8)
NET = Network("inception2015", lambda: lambda x, _: {"features": x.mean((1, 2))}, batch=8)
FEATURES = NET(PICTURES, [0] * 12)["features"]
FACTS = NET.about | {"count": 12, "resolution": [4, 4, 3], "data": "cats"}
REFERENCE = {"mu": FEATURES.mean(0), "sigma": np.cov(FEATURES.T), "feats": FEATURES}
REFERENCE |= {"arr_0": PICTURES, "arr_1": np.arange(12), "about": np.array(json.dumps(FACTS))}


def read_reference(path):
    found = references.read(str(path), NET)
    return found.moments(), found.array()


def read_samples(path):
    return sample_files.read(str(path)).draw(0, 12)


def test_few_rows_take_little_memory(tmp_path):
    path = tmp_path / "large.npz"
    np.savez(path, arr_0=np.full((400, 64, 64, 3), 9, np.uint8))
    tracemalloc.start()
    samples = sample_files.read(str(path))
    samples.draw(200, 210)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6 < path.stat().st_size  # 100 of 400 rows are looked at


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_changed_bytes_and_cuts_are_found(tmp_path, save):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    save(good, **REFERENCE)
    whole = good.read_bytes()
    for at in RNG.integers(0, len(whole), 60):
        changed = bytearray(whole)
        changed[at] ^= 1 << int(RNG.integers(8))
        for content in (bytes(changed), whole[:at]):
            bad.write_bytes(content)
            for read in (lambda path: read_reference(path)[1], read_samples):
                try:
                    found = read(bad)
                except ValueError as error:
                    assert str(error).startswith(str(bad)), error
                else:  # a byte that has no meaning
                    np.testing.assert_array_equal(found, read(good))


def test_a_header_of_another_size_is_found(tmp_path):
    path = tmp_path / "a.npz"
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        raw, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 4, 4, 3)}
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", raw.getvalue() + PICTURES.tobytes())
    with pytest.raises(ValueError, match=r"a\.npz cannot be read: it is damaged"):
        npz.read(path)


def test_the_order_of_axes_in_a_file_does_not_matter(tmp_path):
    x = RNG.normal(size=(7, 5, 3))
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(x))
    found = npz.read(tmp_path / "a.npz")["x"]
    np.testing.assert_array_equal(found.rows(2, 6), x[2:6])
    np.testing.assert_array_equal(np.concatenate(list(found.chunks(2))), x)


def test_a_whole_reference_is_read(tmp_path):
    np.savez(tmp_path / "r.npz", **REFERENCE)
    known, features = read_reference(tmp_path / "r.npz")
    np.testing.assert_allclose(known.cov, moments([FEATURES]).cov)
    np.testing.assert_array_equal(features, FEATURES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feats": FEATURES[:, 0]}, r"feats must be float \[N, D\], got float64 \(12,\)"),
        ({"feats": FEATURES.astype("U9")}, r"feats must be float \[N, D\]"),
        ({"feats": FEATURES[:, :2]}, r"mu has 3 features, and feats 2"),
        ({"feats": FEATURES[:5]}, r"of the same examples: feats \[5, 3\], arr_0 \[12, 4, 4, 3\]"),
        ({"feats": FEATURES * np.nan}, r"feats contain NaN"),
        ({"arr_1": np.arange(5)}, r"of the same examples: .*arr_1 \[5\]"),
        ({"arr_0": np.ones_like(PICTURES)}, r"arr_0 is uint8, but its largest value is 1"),
        ({"mu": FEATURES.mean(0) + 1j}, r"expected floats mu \[D\].*complex128"),
        ({"sigma": np.triu(np.ones((3, 3)))}, r"sigma is no covariance"),
        ({"sigma": -np.eye(3)}, r"sigma is no covariance"),
        ({"about": np.array("[1]")}, r"was made with network \[1\]"),
        ({"about": np.array("{")}, r"its description is damaged"),
        *(
            ({"about": np.array(json.dumps(FACTS | change))}, f"damaged: {next(iter(change))} is")
            for change in (
                {"count": None},
                {"count": float("nan")},
                {"count": -1},
                {"count": [3]},
                {"resolution": None},
                {"resolution": True},
                {"resolution": ["4", 4, 3]},
            )
        ),
    ],
)
def test_what_a_reference_cannot_be(tmp_path, changes, message):
    np.savez(tmp_path / "r.npz", **REFERENCE | changes)
    with pytest.raises(ValueError, match=rf"r\.npz.*{message}"):
        read_reference(tmp_path / "r.npz")


def test_features_of_an_unknown_network_are_refused(tmp_path):
    np.savez(tmp_path / "r.npz", feats=FEATURES)
    other = Network("taef2", NET.open)
    with pytest.raises(ValueError, match=r"does not say which network .* not taef2"):
        references.read(str(tmp_path / "r.npz"), other)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": np.full((3, 4), "a")}, r"arr_0 must be uint8"),
        ({"arr_0": np.zeros((3, 4), "V4")}, r"arr_0 must be uint8"),
        ({"x": np.float32(3)}, r"x must be uint8 or float, got float32 \(\)"),
        ({"x": PICTURES / 255}, r"x is float in \[0.*pictures in \[0, 1\] become such by 2 \* x"),
        ({"arr_0": PICTURES, "arr_1": np.array(3)}, r"12 samples but 1 labels"),
        ({"arr_0": PICTURES, "arr_1": np.eye(12)}, r"12 samples but 144 labels"),
    ],
)
def test_what_samples_cannot_be(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        sample_files.read(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "second", [{"x": PICTURES / 127.5 - 1}, {"arr_0": PICTURES, "arr_1": np.arange(12)}]
)
def test_a_folder_of_several_kinds_of_samples_is_refused(tmp_path, second):
    np.savez(tmp_path / "0.npz", arr_0=PICTURES)
    np.savez(tmp_path / "1.npz", **second)
    with pytest.raises(ValueError, match=r"samples of several kinds"):
        sample_files.read(str(tmp_path))


def field(number, value):
    """A field of a protocol buffer: a varint, or bytes with their length."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(value):
    low, rest = value & 127, value >> 7
    return bytes([low]) if not rest else bytes([low | 128]) + varint(rest)


CONTENT = np.arange(3, dtype="<f4").tobytes()


def graph(name=b"a", key=b"value", side=3, content=CONTENT):
    shape = field(2, field(2, field(1, side)))
    tensor = field(8, field(1, 1) + shape + field(4, content))
    attribute = field(5, field(1, key) + field(2, tensor))
    return field(1, field(1, name) + field(2, b"Const") + attribute)


def test_a_damaged_graph_is_refused(tmp_path):
    path = tmp_path / "g.pb"
    path.write_bytes(graph())
    np.testing.assert_array_equal(constants(path)["a"].read(), [0, 1, 2])
    for changes in (
        {"side": b"a"},
        {"side": 2**60},
        {"side": 2**64 - 1},
        {"content": 7},
        {"content": b"12345"},
    ):
        path.write_bytes(graph(**changes))
        with pytest.raises(ValueError, match=r"g\.pb is no TensorFlow graph, or is damaged: .*"):
            constants(path)
    for changes in ({"name": 5}, {"key": 2**40}):  # fields of another type are no fields
        path.write_bytes(graph(**changes))
        assert "a" not in constants(path)


def test_an_unreadable_picture_is_named(tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"1\.png cannot be read: "):
        sample_files.read(str(tmp_path)).draw(0, 2)
    (tmp_path / "0.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"0\.png cannot be read: it is not a picture"):
        sample_files.read(str(tmp_path))
