"""Samples and references in files: read by slices, and refused where they cannot be meant."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation import npz, references, sample_files, selection
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.metric import of_array
from diffusion.evaluation.moments import moments
from diffusion.evaluation.networks.network import Network, pixels

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (23, 4, 4, 3), np.uint8)


def mean_colour(name="inception2015", **options):
    """A stand-in for a network of pictures: the mean of each channel, [B, 3]."""
    return Network(name, lambda: lambda x, _: {"features": x.mean((1, 2))}, batch=8, **options)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_are_read_without_the_rest(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=PICTURES, arr_1=np.arange(23), text=np.array(["é", "bc"]))
    arrays = npz.read(tmp_path / "a.npz")
    assert arrays["arr_0"].shape == PICTURES.shape and arrays["arr_0"].dtype == np.uint8
    for first, end in [(0, 23), (5, 9), (22, 23), (7, 7), (20, 99)]:
        np.testing.assert_array_equal(arrays["arr_0"].rows(first, end), PICTURES[first:end])
    parts = list(arrays["arr_1"].chunks(10))
    assert [len(part) for part in parts] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(23))
    assert arrays["text"].whole().tolist() == ["é", "bc"]


def test_a_file_is_written_in_chunks(tmp_path):
    path = tmp_path / "a.npz"
    chunks = (PICTURES[i : i + 7] for i in range(0, 23, 7))
    values = np.linspace(0, 1, 5)
    npz.write(path, {"arr_0": (PICTURES.shape, np.uint8, chunks), "mu": ((5,), "<f8", (values,))})
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], PICTURES)
        np.testing.assert_array_equal(file["mu"], values)

    def broken():
        yield PICTURES[:7]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        npz.write(tmp_path / "b.npz", {"arr_0": (PICTURES.shape, np.uint8, broken())})
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_samples_of_every_kind_of_file(tmp_path):
    np.savez(tmp_path / "adm.npz", PICTURES, np.arange(23))
    found = sample_files.read(str(tmp_path / "adm.npz"))
    assert found.count == 23 and found.subjects == list(range(23)) and len(found.checksum) == 16
    np.testing.assert_array_equal(found.draw(4, 9), PICTURES[4:9])
    assert sample_files.read(str(tmp_path / "adm.npz"), 7).subjects == list(range(7))

    (tmp_path / "shards").mkdir()
    for number, part in enumerate((PICTURES[:10], PICTURES[10:13], PICTURES[13:])):
        np.savez(tmp_path / "shards" / f"{number:05d}.npz", arr_0=part)
    shards = sample_files.read(str(tmp_path / "shards"))
    np.testing.assert_array_equal(shards.draw(0, 23), PICTURES)
    np.testing.assert_array_equal(shards.draw(8, 15), PICTURES[8:15])
    assert shards.subjects == []

    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(PICTURES[:3]):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:06d}.png")
    folder = sample_files.read(str(tmp_path / "pictures"))
    np.testing.assert_array_equal(folder.draw(0, 3), PICTURES[:3])

    x = PICTURES / 127.5 - 1
    np.savez(tmp_path / "ours.npz", x=x.astype(np.float32), caption=np.array(["a"] * 23))
    ours = sample_files.read(str(tmp_path / "ours.npz"))
    assert ours.subjects == ["a"] * 23
    np.testing.assert_allclose(ours.draw(0, 2), x[:2], atol=1e-6)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": PICTURES / 127.5 - 1}, r"uint8 0\.\.255 .*got float64 in \[-1, .*round\(127"),
        ({"arr_0": PICTURES.astype(np.int64)}, r"uint8 0\.\.255.*got int64"),
        ({"arr_0": (PICTURES > 99).astype(np.uint8)}, r"largest value is 1: were floats cut"),
        ({"arr_0": PICTURES[0]}, r"uint8 0\.\.255 \[N, H, W, 3\], got uint8.*\(4, 4, 3\)"),
        ({"x": PICTURES.astype(np.float32)}, r"x is float in \[0, 255\]; expected \[-1, 1\]"),
        ({"x": PICTURES.astype(np.int32)}, r"x must be uint8 or float, got int32"),
        ({"mu": np.zeros(3)}, r"holds no samples: expected arr_0, image, x, got mu"),
        ({"arr_0": PICTURES, "arr_1": np.arange(3)}, r"23 samples but 3 labels"),
        ({"arr_0": np.array([{}], object)}, r"an array of Python objects"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        sample_files.read(str(tmp_path / "a.npz"))


def test_too_few_cut_off_and_absent_samples(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=PICTURES)
    with pytest.raises(ValueError, match=r"has 23 samples, and config.evaluation.count=50"):
        sample_files.read(str(path), 50)
    whole = path.read_bytes()
    for length in (0, 40, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
            sample_files.read(str(path))
    with pytest.raises(FileNotFoundError, match=r"no such file.*b\.npz"):
        sample_files.read(str(tmp_path / "b.npz"))
    (tmp_path / "stats.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"runs whatever code.*Convert it"):
        sample_files.read(str(tmp_path / "stats.pkl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither \.npz files nor pictures"):
        sample_files.read(str(tmp_path / "empty"))
    for name, side in (("a", 4), ("b", 5)):
        Image.new("RGB", (side, 4)).save(tmp_path / "empty" / f"{name}.png")
    with pytest.raises(ValueError, match=r"b\.png is 4 x 5, and a\.png is 4 x 4"):
        sample_files.read(str(tmp_path / "empty")).draw(0, 2)


def written(path, net, **changes):
    x = net(PICTURES, [0] * 23)["features"]
    about = {"data": "cats train", "resolution": [4, 4, 3]} | changes
    pictures = ((5, 4, 4, 3), (PICTURES[:5],))
    references.write(path, net, {"features": moments([x])}, x[:5], pictures, np.arange(5), about)
    return x


def test_a_reference_goes_there_and_back(tmp_path):
    net, path = mean_colour(), tmp_path / "r.npz"
    x = written(path, net)
    found = references.read(str(path), net)
    assert found.name == "cats train" and found.count == 5 and found.shape == (4, 4, 3)
    assert found.subjects == list(range(5)) and found.about["statistics_of"] == 23
    assert found.moments().count == 23
    np.testing.assert_allclose(found.moments().mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.moments().cov, np.cov(x.T), rtol=1e-10)
    np.testing.assert_allclose(found.array(), x[:5], rtol=1e-6)
    with np.load(path) as file:  # what ADM's, EDM's and clean-fid's evaluators take out of it
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert file["arr_0"].dtype == np.uint8 and file["feats"].shape == (5, 3)
        assert json.loads(str(file["about"]))["network"] == "inception2015"


def test_references_of_others(tmp_path):
    net, path = mean_colour(), tmp_path / "r.npz"
    x = net(PICTURES, [0] * 23)["features"]
    mean, cov = x.mean(0), np.cov(x.T)
    np.savez(path, mu=mean, sigma=cov)  # EDM, clean-fid
    found = references.read(str(path), net)
    np.testing.assert_array_equal(found.moments().cov, cov)
    judge = Harness(selection.make(("fid()", "frechet()"), None, "m", net), reference=str(path))
    figures = judge.evaluate(of_array(PICTURES))  # against statistics alone
    assert figures["fid_inception2015"] < 1e-6 and "fd_inception2015_half" not in figures
    with pytest.raises(ValueError, match=r"has statistics only; this metric needs feats or"):
        found.array()
    with pytest.raises(ValueError, match=r"does not say which network .* inception2015, not vgg"):
        references.read(str(path), mean_colour("vgg"))
    np.savez(path, arr_0=PICTURES, mu=mean, sigma=cov, mu_s=np.zeros(7), sigma_s=np.eye(7))  # ADM
    found = references.read(str(path), net)
    np.testing.assert_array_equal(found.array(), x)
    assert found.moments("spatial").mean.shape == (7,) and found.shape == (4, 4, 3)
    np.savez(path, feats=x)  # clean-fid's for KID
    np.testing.assert_array_equal(references.read(str(path), net).array(), x)


@pytest.mark.parametrize(
    "net, message",
    [
        (mean_colour("vgg"), r"made with network 'inception2015', and the network here has 'vgg'"),
        (
            mean_colour(preparation="PIL"),
            r"made with preparation '', .* has 'PIL'.*--mode=reference",
        ),
        (pixels(), r"made with network 'inception2015', .* 'pixels'"),
    ],
)
def test_references_of_another_network(tmp_path, net, message):
    written(tmp_path / "r.npz", mean_colour())
    with pytest.raises(ValueError, match=message):
        references.read(str(tmp_path / "r.npz"), net)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma \[D, D\], got \(3,\), \(4, 4\)"),
        ({"mu": np.zeros(3)}, r"got \(3,\), \(0,\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, r"contain NaN"),
        ({"x": np.zeros(3)}, r"no reference: expected mu and sigma, feats or arr_0, got x"),
        ({"arr_0": PICTURES / 255}, r"arr_0 must be uint8"),
        ({"mu": np.zeros(1), "about": np.array("{")}, r"its description is damaged"),
    ],
)
def test_damaged_references(tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        references.read(str(tmp_path / "r.npz"), mean_colour())
