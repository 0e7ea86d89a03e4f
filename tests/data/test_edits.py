"""Pictures before and after an edit: pairs stay pairs, and whole pictures are held out."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from diffusion.data import batches as pipeline
from diffusion.data import edits, folder
from diffusion.data.batches import Augmentation

COUNT = 12
WHITE = (255, 255, 255)


def levels(x):
    """Grey levels of the left and the right half of pictures."""
    return np.round((x[:, 0, [0, -1], 0] + 1) * 127.5).astype(int)


def pictures():
    """Each of 12 pictures with two edits: 100 brighter, or 50 brighter; left and right differ."""
    images = np.zeros((COUNT, 4, 4, 3), np.uint8)
    images[:, :, :2] = np.arange(COUNT)[:, None, None, None]
    images[:, :, 2:] = 2 * np.arange(COUNT)[:, None, None, None]
    images = np.repeat(images, 2, axis=0)
    added = np.tile([100, 50], COUNT).astype(np.uint8)
    captions = np.tile(["much brighter", "brighter"], COUNT)
    return images, images + added[:, None, None, None], captions


@pytest.fixture(scope="module", params=["arrays", "files"])
def read(request, tmp_path_factory):
    """split -> source, of an .npz or of a folder."""
    root = tmp_path_factory.mktemp("edits")
    images, edited, captions = pictures()
    if request.param == "arrays":
        np.savez(root / "edits.npz", images=images, edited=edited, caption=captions)
        return lambda split: edits.from_arrays(
            "edits", edits.read(root / "edits.npz", split, 0.3), 4, WHITE
        )
    lines = []
    for i in range(2 * COUNT):
        Image.fromarray(images[i]).save(root / f"{i // 2}.png")
        Image.fromarray(edited[i]).save(root / f"{i // 2}_{i % 2}.png")
        row = {"file_name": f"{i // 2}.png", "edited": f"{i // 2}_{i % 2}.png"}
        lines.append(json.dumps(row | {"text": str(captions[i])}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return lambda split: edits.from_listing("edits", folder.read(root, split, 0.3), 4, 3, WHITE)


def test_pairs_are_pairs_and_pictures_are_held_out_with_all_their_edits(read):
    seen = {}
    for split in ("train", "test"):
        source = read(split)
        batch = source.all()
        added = levels(batch["x"]) - levels(batch["image"])
        expected = [100 if caption == "much brighter" else 50 for caption in source.captions]
        np.testing.assert_array_equal(added, np.repeat(np.array(expected)[:, None], 2, axis=1))
        seen[split] = sorted(levels(batch["image"])[:, 0].tolist())
    both = set(seen["train"]), set(seen["test"])
    assert both[0] | both[1] == set(range(COUNT)) and not both[0] & both[1] and both[1]
    assert all(seen[split].count(k) == 2 for split in seen for k in seen[split])


def test_both_are_mirrored_together(read):
    flip = Augmentation(flip=True)
    mirrored = 0
    for batch in itertools.islice(pipeline.batches(read("train"), 6, 0, augmentation=flip), 4):
        given, made = levels(batch["image"]), levels(batch["x"])
        added = made - given
        assert np.all(added[:, 0] == added[:, 1]) and set(added[:, 0]) <= {50, 100}
        mirrored += np.sum(given[:, 0] > given[:, 1])
    assert 3 < mirrored < 21


def test_both_are_cropped_at_the_same_place(tmp_path):
    wide = np.tile(np.arange(12, dtype=np.uint8)[None, :, None], (4, 1, 3))
    lines = []
    for i in range(6):
        Image.fromarray(wide + i).save(tmp_path / f"{i}.png")
        Image.fromarray(wide + i + 100).save(tmp_path / f"{i}_after.png")
        row = {"file_name": f"{i}.png", "edited": f"{i}_after.png", "text": "brighter"}
        lines.append(json.dumps(row))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = edits.from_listing("edits", folder.read(tmp_path, "train", 0.2), 4, 3, WHITE)
    random = Augmentation(crop="random")
    found = set()
    for batch in itertools.islice(pipeline.batches(source, 4, 0, augmentation=random), 5):
        np.testing.assert_allclose(batch["x"] - batch["image"], 100 / 127.5, atol=1e-6)
        found |= set((levels(batch["image"])[:, 1] - levels(batch["image"])[:, 0]).tolist())
        found |= set(levels(batch["image"])[:, 0].tolist())
    assert len(found) > 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"edited": None}, r"lacks \['edited'\]"),
        ({"edited": np.zeros((3, 4, 4, 3), np.uint8)}, "24 'images' but 3 'edited'"),
        ({"images": np.zeros((24, 4, 4, 3))}, "'images' must be uint8"),
        ({"caption": np.array(["a"])}, "'caption' must be 24 strings"),
    ],
)
def test_files_without_pairs_are_refused(change, message, tmp_path):
    arrays = dict(zip(("images", "edited", "caption"), pictures())) | change
    path = tmp_path / "edits.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        edits.read(path, "train", 0.3)


def test_folders_without_pairs_are_refused(tmp_path):
    for name in "ab":
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{name}.png")

    def write(*rows):
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    row = {"file_name": "a.png", "text": "red"}
    write(row, {"file_name": "b.png", "text": "red"})
    with pytest.raises(ValueError, match=r"needs a metadata\.jsonl with lines"):
        edits.from_listing("edits", folder.read(tmp_path, "train", 0.5), 4, 3, WHITE)
    write(row | {"edited": "b.png"}, {"file_name": "b.png", "text": "red"})
    with pytest.raises(ValueError, match="line 2: expected edited in all lines"):
        folder.read(tmp_path, "train", 0.5)
    write(row | {"edited": "c.png"})
    with pytest.raises(FileNotFoundError, match=r"edited='c\.png': there is no such file"):
        folder.read(tmp_path, "train", 0.5)
    write(row | {"edited": "b.png"}, row | {"edited": "b.png"})
    with pytest.raises(ValueError, match=r"'a\.png' is already in line 1"):
        folder.read(tmp_path, "train", 0.5)
