"""Folders of images: classes, captions, splits, and what is wrong named by file, line, field."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import base
from diffusion.config import data as experiment_data
from diffusion.config.data import make_source
from diffusion.data import folder


@pytest.fixture(autouse=True)
def checked(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_data, "CHECKED", tmp_path / ".checked")


def image(path, value=0, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def metadata(root, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / folder.METADATA).write_text("\n".join(lines) + "\n")


def config(root, **fields):
    c = base.get_config().data
    c.update({"name": "folder", "dir": str(root), **fields})
    return c


def test_class_subfolders_are_labels_in_alphabetical_order(tmp_path):
    for i in range(30):
        image(tmp_path / ("dog", "ant", "cat")[i % 3] / "deeper" / f"{i}.png", i)
    train, test = (make_source(config(tmp_path, held_out=0.3), s) for s in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "cat", "dog")
    assert train.num_classes == 3 and train.shape == (4, 4, 3)
    assert len(train) + len(test) == 30 and 3 <= len(test) <= 15
    values = []
    for source in (train, test):
        batch = source.all()
        value = np.round((batch["x"][:, 0, 0, 0] + 1) * 127.5).astype(int)
        np.testing.assert_array_equal(batch["label"], np.array([2, 0, 1])[value % 3])
        assert batch["label"].dtype == np.int32
        values += value.tolist()
    assert sorted(values) == list(range(30))


def test_the_same_images_are_held_out_when_others_are_added(tmp_path):
    for i in range(40):
        image(tmp_path / f"{i}.png")
    before = set(folder.read(tmp_path, "test", 0.2).files)
    for i in range(40, 80):
        image(tmp_path / f"{i}.png")
    after = set(folder.read(tmp_path, "test", 0.2).files)
    assert {f for f in after if int(f[:-4]) < 40} == before
    assert not after & set(folder.read(tmp_path, "train", 0.2).files)
    assert folder.read(tmp_path, "train").label is None


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_split_subfolders(tmp_path, name):
    for i, kind in enumerate(("ant", "bee", "cat")):
        image(tmp_path / "train" / kind / "1.png", i)
    image(tmp_path / name / "cat" / "1.png", 9)
    train, test = folder.read(tmp_path, "train"), folder.read(tmp_path, "test")
    assert train.files == ("ant/1.png", "bee/1.png", "cat/1.png")
    # One class alone is fine where train says which there are.
    assert test.label.tolist() == [2] and test.class_names == train.class_names
    image(tmp_path / name / "dog" / "1.png")
    with pytest.raises(ValueError, match="class 'dog', which train lacks"):
        folder.read(tmp_path, "test")
    image(tmp_path / "car" / "1.png")
    with pytest.raises(ValueError, match="in train, a split, and in car, which is not"):
        folder.read(tmp_path, "train")


def test_captions_and_labels_of_the_metadata(tmp_path):
    for i in range(6):
        image(tmp_path / "sub" / f"{i}.png", i)
    rows = [{"file_name": f"sub/{i}.png", "text": f"nr {i} ü"} for i in (4, 1, 2, 0)]
    metadata(tmp_path, [*rows[:2], "", *rows[2:]])
    listing = folder.read(tmp_path, "train")
    held_out = folder.read(tmp_path, "test")
    pairs = dict(zip(listing.files + held_out.files, listing.captions + held_out.captions))
    assert pairs == {row["file_name"]: row["text"] for row in rows}
    assert listing.label is None
    metadata(tmp_path, [{**row, "label": name} for row, name in zip(rows, "bcab")])
    both = [folder.read(tmp_path, split) for split in ("train", "test")]
    labels = {f: int(k) for x in both for f, k in zip(x.files, x.label)}
    assert labels == {"sub/4.png": 1, "sub/1.png": 2, "sub/2.png": 0, "sub/0.png": 1}
    assert both[0].class_names == both[1].class_names == ("a", "b", "c")


def test_metadata_of_splits_in_each_or_above_them(tmp_path):
    for split in ("train", "test"):
        for i in range(2):
            image(tmp_path / split / f"{i}.png", i)
        metadata(tmp_path / split, [{"file_name": f"{i}.png", "caption": split} for i in range(2)])
    each = [folder.read(tmp_path, split) for split in ("train", "test")]
    rows = [{"file_name": f"{s}/{i}.png", "caption": s} for s in ("train", "test") for i in (0, 1)]
    metadata(tmp_path, rows)
    above = [folder.read(tmp_path, split) for split in ("train", "test")]
    for a, b, split in zip(each, above, ("train", "test")):
        assert a.captions == b.captions == (split, split)
        assert [a.pictures.get(i) for i in (0, 1)] == [b.pictures.get(i) for i in (0, 1)]


ROW = {"file_name": "0.png", "text": "a"}


@pytest.mark.parametrize(
    "rows, message",
    [
        (["{"], r"metadata\.jsonl, line 1 is not JSON"),
        ([ROW, "[1]"], "line 2 is not a JSON object"),
        ([ROW, {"text": "b"}], "line 2: file_name is missing"),
        ([ROW, {**ROW, "file_name": 3}], "line 2: file_name must be a non-empty text.*got 3"),
        ([ROW, "", {**ROW, "file_name": "7.png"}], "line 3: file_name='7.png': there is no such"),
        ([ROW, {**ROW, "file_name": "./0.png"}], "line 2: file_name='0.png' is already in line 1"),
        ([ROW, {"file_name": "1.png"}], "line 2: text is missing"),
        (
            [ROW, {"file_name": "1.png", "text": " "}],
            "line 2: text must be a non-empty.*got ' '",
        ),
        ([ROW, {"file_name": "1.png", "text": None}], "line 2: text must be a non-empty text"),
        ([{**ROW, "label": "a"}, {"file_name": "1.png", "text": "b"}], "line 2: label must be a n"),
        ([{**ROW, "label": 0}, {**ROW, "file_name": "1.png", "label": -1}], "line 2: label.*-1"),
        ([{"file_name": "0.png"}], "neither text, caption nor label"),
        ([], "metadata.jsonl is empty"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, rows, message):
    for i in range(3):
        image(tmp_path / f"{i}.png")
    metadata(tmp_path, rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folder.read(tmp_path, "train")


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder.read(tmp_path / "absent", "train")
    with pytest.raises(FileNotFoundError, match="no images in"):
        folder.read(tmp_path, "train")
    image(tmp_path / "cat" / "1.png")
    image(tmp_path / "cat" / "2.png")
    with pytest.raises(ValueError, match=r"one class subfolder only, 'cat'.*data\.dir=.*/cat\)"):
        folder.read(tmp_path, "train")
    image(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"in subfolders \(cat, ...\).*beside them \(3.png\)"):
        folder.read(tmp_path, "train")
    image(tmp_path / "one" / "1.png")
    with pytest.raises(ValueError, match="has 1 image, too few to hold one out"):
        folder.read(tmp_path / "one", "train")
    image(tmp_path / "tested" / "test" / "1.png")
    with pytest.raises(FileNotFoundError, match="has test but no train"):
        folder.read(tmp_path / "tested", "train")


@pytest.fixture
def damaged(tmp_path):
    root = tmp_path / "images"
    for i in range(12):
        image(root / f"{i:02d}.png", i, (32, 32))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(root / "05.png")
    data = (root / "05.png").read_bytes()
    (root / "05.png").write_bytes(data[: len(data) // 2])
    (root / "07.png").write_bytes(b"no image")
    return root


def test_unreadable_files_are_fatal_by_name(damaged):
    train = make_source(config(damaged, size=8), "train")
    test = make_source(config(damaged, size=8), "test")
    with pytest.raises(ValueError, match=r"images/05\.png cannot be read.*on_error=skip"):
        for source in (train, test):
            source.read(np.arange(min(6, len(source))))
    with pytest.raises(ValueError, match=r"images/07\.png cannot be read: it is not a picture"):
        for split in ("train", "test"):  # headers alone are read for the sizes
            make_source(config(damaged), split)


def test_unreadable_files_are_left_out_by_choice(damaged, capsys):
    c = config(damaged, on_error="skip", size=8, held_out=0.2)
    seen = []
    for split in ("train", "test"):
        seen += np.round((make_source(c, split).all()["x"][:, 0, 0, 0] + 1) * 127.5).tolist()
    assert sorted(seen) == [i for i in range(12) if i not in (5, 7)]
    err = capsys.readouterr().err
    assert err.count("left out: ") == 2 and err.count("05.png") == err.count("07.png") == 1
    # What was found out is remembered, until a file changes.
    checked = list(experiment_data.CHECKED.iterdir())
    assert len(checked) == 2
    make_source(c, "train")
    assert len(list(experiment_data.CHECKED.iterdir())) == 2
    image(damaged / "07.png", 7, (32, 32))
    assert sum(len(make_source(c, split)) for split in ("train", "test")) == 11
    for i in range(12):
        (damaged / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the .* can be read"):
        make_source(c, "train")


def test_sizes_and_channels(tmp_path):
    for i in range(4):
        image(tmp_path / f"{i}.png", i, (6, 9))
    assert make_source(config(tmp_path), "train").shape == (6, 9, 3)
    assert make_source(config(tmp_path, channels=1), "train").shape == (6, 9, 1)
    assert make_source(config(tmp_path, size=5), "train").shape == (5, 5, 3)
    image(tmp_path / "4.png", 0, (6, 8))
    with pytest.raises(ValueError, match=r"several sizes: .* 6 x 9 and .* 6 x 8; set config"):
        make_source(config(tmp_path, held_out=0.01), "train")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(crop="centre"), r"config\.data\.crop: unknown 'centre'.*'center'"),
        (dict(dtype="float16"), r"config\.data\.dtype"),
        (dict(on_error="ignore"), r"config\.data\.on_error"),
        (dict(channels=4), r"config\.data\.channels=4"),
        (dict(held_out=1.0), r"config\.data\.held_out"),
        (dict(buckets="aspect"), r"config\.data\.buckets='aspect' needs config\.data\.size"),
        (dict(size=8, buckets="aspects"), r"config\.data\.buckets: unknown 'aspects'"),
        (dict(size=8, buckets="aspect(step=3)"), r"step=3 must divide the size 8"),
        (dict(size=8, buckets="aspect(step=4, max_aspect=0.5)"), "max_aspect must be at least 1"),
        (dict(dir=""), r"config\.data\.dir must name the folder"),
        (dict(dir="nowhere"), r"config\.data\.dir='nowhere': no such folder"),
    ],
)
def test_wrong_fields_are_named(tmp_path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_source(config(tmp_path, **{"size": 0} | fields), "train")


def test_captions_beside_images(tmp_path):
    for name in ("1.png", "b/2.png"):
        image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"\ufeffa cat, {name}\n", "utf-8")
    (tmp_path / "README.txt").write_text("of no image")
    listing = folder._read_one(tmp_path)
    assert listing.files == ("1.png", "b/2.png") and listing.label is None
    assert listing.captions == ("a cat, 1.png", "a cat, b/2.png")
    source = make_source(config(tmp_path, held_out=0.5), "train")
    assert len(source.captions) == 1 and source.captions[0].startswith("a cat")
    (tmp_path / "b/2.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"b/2.txt.* must be a non-empty text"):
        folder.read(tmp_path, "train")
    (tmp_path / "b/2.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b/2.txt is not UTF-8"):
        folder.read(tmp_path, "train")
    (tmp_path / "b/2.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(1.txt\), but not beside b/2.png; expected b/2"):
        folder.read(tmp_path, "train")


def test_captions_and_labels_of_a_table(tmp_path):
    for name in ("1.png", "2.png"):
        image(tmp_path / name)
    table = tmp_path / folder.TABLE
    table.write_text('file_name,text,label\n1.png,"a cat, red",1\n2.png,dog,0\n')
    listing = folder._read_one(tmp_path)
    assert listing.captions == ("a cat, red", "dog") and listing.label.tolist() == [1, 0]
    for text, message in {
        "file_name,text\n1.png,a cat, red\n": "line 2 has not as many fields as the header",
        "file_name,text\n1.png\n": "line 2 has not as many fields",
        "file_name,text\n3.png,dog\n": "line 2: file_name='3.png': there is no such file",
        "file_name,text\n1.png,\n": "line 2: text must be a non-empty text",
        'file_name,text\n1.png,"dog\n': "is not CSV",
        "": "is empty",
        "file_name\n1.png\n": "has neither text, caption nor label",
    }.items():
        table.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            folder.read(tmp_path, "train")
    metadata(tmp_path, [{"file_name": "1.png", "text": "a cat"}])
    with pytest.raises(ValueError, match=r"both metadata.jsonl and metadata.csv"):
        folder.read(tmp_path, "train")
