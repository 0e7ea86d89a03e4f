"""Aspect-ratio buckets: shapes, and a stream in which every example is seen equally often."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from configs import base
from diffusion.config.data import make_source
from diffusion.data import batches as pipeline
from diffusion.data import buckets
from diffusion.data.batches import Augmentation
from diffusion.data.image_source import from_pictures
from diffusion.data.sources import Pictures, from_arrays

SIZES = (7, 1, 12)


def source():
    """Three buckets; an example's label is its number."""
    parts, first = [], 0
    for b, n in enumerate(SIZES):
        x = np.full((n, 2, 2 + b, 1), b, np.uint8)
        parts.append(from_arrays("part", x, first + np.arange(n), num_classes=sum(SIZES)))
        first += n
    whole = from_arrays("whole", np.zeros((sum(SIZES), 2, 2, 1), np.uint8))
    return dataclasses.replace(whole, buckets=tuple(parts))


def take(n, *args, **kwargs):
    return list(itertools.islice(pipeline.batches(*args, **kwargs), n))


@pytest.mark.parametrize("size, step", [(512, 64), (1024, 64), (64, 16), (32, 32)])
def test_shapes_have_about_the_area_of_the_square(size, step):
    shapes = buckets.aspect(size, step)
    assert (size, size) in shapes and len(set(shapes)) == len(shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    for h, w in shapes:
        assert h % step == w % step == 0 and 0.5 <= h / w <= 2
        assert size**2 - max(h, w) * step < h * w <= size**2


def test_shapes_of_sdxl():
    wide = [(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344)]
    assert buckets.aspect(1024)[-5:] == tuple(wide)


def test_images_go_to_the_nearest_shape():
    shapes = [(80, 48), (64, 64), (48, 80)]
    sizes = np.array([[100, 100], [1000, 500], [30, 60], [100, 110], [110, 100]])
    assert buckets.nearest(sizes, shapes).tolist() == [1, 0, 2, 1, 1]
    # As far in one direction as in the other.
    edge = np.exp(np.log(80 / 48) / 2)
    both = np.array([[100, 100 * edge * 0.99], [100 * edge * 1.01, 100]])
    assert buckets.nearest(both, shapes).tolist() == [1, 0]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 24])
def test_every_bucket_is_gone_through_once_per_epoch(batch_size):
    labels = [[], [], []]
    epochs = 12
    steps = sum(n * epochs // batch_size for n in SIZES)
    for batch in take(steps, source(), batch_size, 3):
        bucket = batch["x"].shape[2] - 2
        assert len(set(np.digitize(batch["label"], np.cumsum(SIZES)))) == 1
        labels[bucket] += batch["label"].tolist()
    for b, (seen, n) in enumerate(zip(labels, SIZES)):
        # After 12 epochs every bucket has given 12 times its examples, less a part of a batch.
        assert 0 <= epochs * n - len(seen) < batch_size
        first = sum(SIZES[:b])
        whole = np.array(seen[: len(seen) // n * n]).reshape(-1, n)
        np.testing.assert_array_equal(
            np.sort(whole), np.tile(first + np.arange(n), (len(whole), 1))
        )


def test_buckets_are_shuffled_within_epochs():
    schedule = buckets.Schedule((40, 60), 2, 0)
    order = [[schedule(step)[0] for step in range(50 * e, 50 * (e + 1))] for e in range(3)]
    assert [sum(o) for o in order] == [30] * 3 and len(set(map(tuple, order))) == 3
    assert all(10 < sum(o[:25]) < 20 for o in order)
    assert [schedule(s) for s in range(99)] == [
        buckets.Schedule((40, 60), 2, 0)(s) for s in range(99)
    ]
    assert order[0] != [buckets.Schedule((40, 60), 2, 1)(step)[0] for step in range(50)]


def test_resuming_and_processes_see_the_same_stream():
    whole = take(30, source(), 6, 0)
    resumed = take(5, source(), 6, 0, 25, num_threads=1, prefetch=1)
    parts = [take(30, source(), 6, 0, process_index=i, process_count=3) for i in range(3)]
    for step, batch in enumerate(whole):
        for name in batch:
            if step >= 25:
                np.testing.assert_array_equal(batch[name], resumed[step - 25][name])
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(batch[name], joined)


@pytest.fixture
def scenes(tmp_path):
    """Twelve photographs, so to speak: a vertical and a horizontal ramp, of several shapes."""
    for i, (h, w) in enumerate(4 * [(40, 20), (20, 40), (30, 30)]):
        y, x = np.mgrid[:h, :w] / np.array([h, w])[:, None, None]
        image = np.stack([255 * x, 255 * y, np.full_like(x, i)], -1).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return tmp_path


def scenes_config(path, **fields):
    c = base.get_config().data
    c.update(
        {"name": "folder", "dir": str(path), "size": 16, "buckets": "aspect(step=4)", **fields}
    )
    return c


def test_a_folder_in_buckets(scenes):
    train, test = (make_source(scenes_config(scenes, held_out=0.2), s) for s in ("train", "test"))
    assert not test.buckets and test.shape == train.shape == (16, 16, 3)
    shapes = {part.shape[:2]: part for part in train.buckets}
    assert sum(map(len, train.buckets)) == len(train) == 12 - len(test)
    assert set(shapes) == {(20, 12), (16, 16), (12, 20)}
    for (h, w), part in shapes.items():
        batch = part.all()["x"]
        number = np.round((batch[:, 0, 0, 2] + 1) * 127.5).astype(int)
        expected = {(20, 12): 0, (12, 20): 1, (16, 16): 2}[h, w]
        assert set(number % 3) == {expected}
        # Nearly the whole picture is there, where a square would show half.
        assert np.ptp(batch[..., 0], axis=(1, 2)).min() > 1.5
        assert np.ptp(batch[..., 1], axis=(1, 2)).min() > 1.5
    assert np.ptp(test.all()["x"][..., :2], axis=(1, 2)).max() < 2


def test_random_crops_and_flips_in_buckets_depend_on_seed_and_step_alone(scenes):
    train = make_source(scenes_config(scenes), "train")
    moved = Augmentation(flip=True, crop="random")
    whole = take(9, train, 4, 1, augmentation=moved)
    again = take(2, train, 4, 1, 7, augmentation=moved, num_threads=3)
    parts = [
        take(9, train, 4, 1, augmentation=moved, process_index=i, process_count=2) for i in (0, 1)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["x"], np.concatenate([p[step]["x"] for p in parts]))
        if step >= 7:
            np.testing.assert_array_equal(batch["x"], again[step - 7]["x"])
    plain = take(9, train, 4, 1)
    assert any((a["x"] != b["x"]).any() for a, b in zip(whole, plain))


def test_random_crops_are_anew_in_every_epoch_and_cover_the_picture():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (4, 256))
    pictures = Pictures(50, lambda i: ramp, str)
    ramps = from_pictures("ramps", pictures, (4, 4, 1))
    batches = take(8, ramps, 50, 0, augmentation=Augmentation(crop="random"))
    left = np.stack([np.sort(np.round((b["x"][:, 0, 0, 0] + 1) * 127.5)) for b in batches])
    assert left.min() < 10 and left.max() > 242 and left.max() <= 252
    assert left.mean() == pytest.approx(126, abs=12)  # uniform, standard deviation 73 / 20
    assert len(np.unique(left, axis=0)) == 8
    middle = take(1, ramps, 50, 0)[0]["x"]
    assert np.all(np.round((middle[:, 0, 0, 0] + 1) * 127.5) == 126)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="crop='random': numbers has images of one size"):
        pipeline.batches(
            from_arrays("numbers", np.zeros((2, 2, 2, 1))),
            2,
            0,
            augmentation=Augmentation(crop="random"),
        )
    with pytest.raises(ValueError, match="dtype='float16'; choose float32 or bfloat16"):
        pipeline.batches(source(), 2, 0, augmentation=Augmentation(dtype="float16"))
    with pytest.raises(ValueError, match="workers must not be negative"):
        pipeline.batches(source(), 2, 0, workers=-1)
    with pytest.raises(ValueError, match="every bucket must hold an example"):
        buckets.Schedule((1, 0), 2, 0)


def test_half_precision_keeps_every_grey_level():
    levels = from_arrays("levels", np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1))
    batch = take(1, levels, 256, 0, augmentation=Augmentation(dtype="bfloat16"))[0]["x"]
    assert batch.dtype.name == "bfloat16"
    exact = take(1, levels, 256, 0)[0]["x"]
    np.testing.assert_array_equal(
        np.round((batch.astype(np.float32) + 1) * 127.5), np.round((exact + 1) * 127.5)
    )
