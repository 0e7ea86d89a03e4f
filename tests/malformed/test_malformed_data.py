"""Images, captions and arrays that cannot be trained on: named by file, and left as they are."""

import json
import os

import numpy as np
import pytest
from commands import assert_names, assert_nothing_lost, command, contents
from PIL import Image

SMALL = ["--config.model.unet.widths=(8,)", "--config.model.unet.attention=0"]
SMALL += ["--config.model.unet.mid_attention=0", "--config.train.batch_size=8"]


def train(tmp_path, name, *arguments):
    """Trains on tmp_path/data as the data set ``name``; what the error says. Data stay."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    before = contents(tmp_path)
    root = next((p for p in (data.with_suffix(".npz"), data) if p.exists()), data)
    error, _ = command(
        *(f"--workdir={workdir}", f"--config.data.name={name}", f"--config.data.dir={root}"),
        *SMALL,
        *arguments,
        config="configs/digits.py",
    )
    assert_nothing_lost(tmp_path, before)
    return error


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(
        255 - b for b in data[len(data) // 3 : len(data) // 2]
    )
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not an image at all")


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "gone.png")


def loop(path):
    path.unlink()
    path.symlink_to(path)


def pipe(path):
    path.unlink()
    path.mkdir()


def header(path):
    """Says that it is 30,000 x 30,000."""
    data = bytearray(path.read_bytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    path.write_bytes(data)


def floats(path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path.with_suffix(".tiff"))
    path.unlink()


@pytest.fixture
def images(tmp_path):
    noise = np.random.default_rng(0)
    for i in range(6):
        for split in ("train", "test"):
            path = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return tmp_path


@pytest.mark.parametrize("damage", [truncate, flip, empty, text, dangling, loop, header, floats])
def test_an_image(images, damage):
    path = images / "data" / "train" / "b" / "3.png"
    damage(path)
    assert_names(train(images, "folder", "--config.data.size=8"), path.with_suffix(""))


@pytest.mark.parametrize("damage", [truncate, flip, empty, text, floats])
def test_an_image_is_left_out_by_choice(images, damage, monkeypatch):
    monkeypatch.setenv("HOME", str(images / "home"))
    monkeypatch.setattr("diffusion.modes.inspect.SECONDS", 0.0)
    path = images / "data" / "train" / "b" / "3.png"
    damage(path)
    error, printed = command(
        *(f"--workdir={images / 'run'}", "--mode=inspect", "--config.data.name=folder"),
        *(
            f"--config.data.dir={images / 'data'}",
            "--config.data.size=8",
            "--config.inspect.count=4",
        ),
        *("--config.data.on_error=skip", "--config.train.batch_size=4"),
        config="configs/digits.py",
    )
    assert error is None
    assert f"{path.with_suffix('')}" in printed


def no_train(root):
    (root / "train").rename(root / "trained")


def one_class(root):
    for path in (root / "train" / "b").iterdir():
        path.unlink()


def other_class(root):
    (root / "test" / "a").rename(root / "test" / "c")


def beside(root):
    (root / "train" / "b" / "1.png").rename(root / "train" / "1.png")


def no_images(root):
    for path in root.rglob("*.png"):
        path.rename(path.with_suffix(".txt"))


def gone(root):
    root.rename(root.with_name("elsewhere"))


def a_file(root):
    root.rename(root.with_name("elsewhere"))
    root.write_text("x")


def sizes(root):
    Image.new("RGB", (1, 1)).save(root / "train" / "b" / "3.png")


@pytest.mark.parametrize(
    "change, names",
    [
        (no_train, ("test",)),
        (one_class, ("train", "'a'")),
        (other_class, ("'c'",)),
        (beside, ("train", "1.png")),
        (no_images, ("no images", ".png")),
        (gone, ("data", "no such folder")),
        (a_file, ("data", "no such folder")),
        (sizes, ("config.data.size", "3.png 1 x 1")),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_folder(images, change, names):
    change(images / "data")
    assert_names(train(images, "folder"), "config.data.", *names)


ROWS = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(6)]


def changed(i, **row):
    return [json.dumps(r | row if k == i else r) for k, r in enumerate(ROWS)]


METADATA = {
    "no JSON": ([*changed(0), "{'file_name'"], "line 7", "not JSON"),
    "cut": ([*changed(0)[:-1], json.dumps(ROWS[5])[:20]], "line 6", "not JSON"),
    "no object": ([*changed(0), "[1, 2]"], "line 7", "object"),
    "twice": ([*changed(0), json.dumps(ROWS[2])], "line 7", "'2.png'", "line 3"),
    "no caption": ([*changed(0)[:5], '{"file_name": "5.png"}'], "line 6", "text is missing"),
    "no name": ([*changed(0), '{"text": "a"}'], "line 7", "file_name is missing"),
    "empty caption": (changed(2, text=" "), "line 3", "text"),
    "a number": (changed(2, text=3), "line 3", "text", "3"),
    "null": (changed(2, text=None), "line 3", "None"),
    "no file": (changed(1, file_name="nothing.png"), "line 2", "nothing.png"),
    "a folder": (changed(1, file_name="."), "line 2", "'.'"),
    "null byte": (changed(1, file_name="a\0b"), "line 2", "file_name"),
    "long name": (changed(1, file_name="x" * 5000), "line 2", "file_name"),
    "labels mixed": (changed(1, label=3), "line 1", "label"),
    "label": ([json.dumps(r | {"label": -1}) for r in ROWS], "line 1", "-1"),
    "huge label": ([json.dumps(r | {"label": 10**30}) for r in ROWS], "line 1", "label"),
    "empty": ([""], "empty"),
    "only names": ([json.dumps({"file_name": r["file_name"]}) for r in ROWS], "caption"),
    "deep": (["[" * 100_000], "line 1", "not JSON"),
    "UTF-16": ("\n".join(changed(0)).encode("utf-16"), "line 1", "UTF-8"),
    "bytes": (b"\xff\xfe\x00garbage\x80", "line 1", "UTF-8"),
}


@pytest.mark.parametrize("name", METADATA)
def test_captions(tmp_path, name):
    lines, *names = METADATA[name]
    (tmp_path / "data").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "data" / f"{i}.png")
    file = tmp_path / "data" / "metadata.jsonl"
    file.write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode())
    assert_names(train(tmp_path, "folder"), "config.data.dir", "metadata.jsonl", *names)


IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
LABEL = np.arange(8) % 2
ARRAYS = {
    "channels first": ({"x": IMAGES.transpose(0, 3, 1, 2)}, "x", "channels first"),
    "flat": ({"x": IMAGES.reshape(8, 64)}, "x", "(8, 64)"),
    "none": ({"x": IMAGES[:0]}, "x", "(0, 8, 8, 1)"),
    "int32": ({"x": IMAGES.astype(np.int32)}, "x", "int32"),
    "complex": ({"x": IMAGES.astype(complex)}, "x", "complex"),
    "text": ({"x": np.full((8, 8, 8, 1), "a")}, "x", "uint8"),
    "objects": ({"x": np.array([{}] * 8)}, "data.npz", "cannot be read"),
    "NaN": ({"x": np.full((8, 8, 8, 1), np.nan, np.float32)}, "x", "nan"),
    "infinite": ({"x": np.full((8, 8, 8, 1), np.inf, np.float32)}, "x", "inf"),
    "0 to 255": ({"x": IMAGES.astype(np.float32)}, "x", "[-1, 1]"),
    "no images": ({"pixels": IMAGES}, "no x", "pixels"),
    "nothing": ({}, "no x"),
    "few labels": ({"x": IMAGES, "label": LABEL[:3]}, "label", "(3,)"),
    "float labels": ({"x": IMAGES, "label": LABEL + 0.5}, "label", "float64"),
    "negative labels": ({"x": IMAGES, "label": LABEL - 1}, "label", "-1"),
    "huge labels": ({"x": IMAGES, "label": LABEL + 2**40}, "label"),
    "captions": ({"x": IMAGES, "caption": np.arange(8)}, "caption", "8 strings"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(tmp_path, name):
    arrays, *names = ARRAYS[name]
    np.savez(tmp_path / "data.npz", **arrays)
    assert_names(train(tmp_path, "arrays"), "config.data.dir", "data.npz", *names)


@pytest.mark.parametrize("damage", [truncate, flip, empty, text, os.unlink, pipe])
@pytest.mark.parametrize("name", ["arrays", "captioned", "latents"])
def test_a_file_of_arrays(tmp_path, name, damage):
    file = tmp_path / "data.npz"
    noise = np.random.default_rng(0).integers(0, 256, (99, 8, 8, 3), np.uint8)
    more = {"caption": [f"number {i}" for i in range(99)]} if name == "captioned" else {}
    more |= {"label": np.zeros(99, int)} if name == "latents" else {}
    np.savez(file, **{"x" if name == "arrays" else "images": noise}, **more)
    damage(file)
    assert_names(train(tmp_path, name, f"--config.data.dir={file}"), "config.data.", "data.npz")
