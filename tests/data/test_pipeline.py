"""The stream of batches is a pure function of (seed, step), complete and shardable."""

import itertools

import numpy as np
import pytest

from diffusion.data import batches as pipeline
from diffusion.data import sources
from diffusion.data.batches import Augmentation

FLIP = Augmentation(flip=True)


def numbered(n, shape=()):
    """A source whose label is the example's number."""
    x = np.arange(n, dtype=np.float32).reshape((n,) + (1,) * len(shape)) * np.ones(shape)
    return sources.from_arrays("numbered", x.astype(np.float32), np.arange(n))


def take(n, *args, **kwargs):
    return list(itertools.islice(pipeline.batches(*args, **kwargs), n))


@pytest.mark.parametrize("batch_size", [4, 5, 12, 30])
def test_every_epoch_covers_every_example_once(batch_size):
    n = 12
    labels = np.concatenate([b["label"] for b in take(20, numbered(n), batch_size, 0)])
    epochs = labels[: len(labels) // n * n].reshape(-1, n)
    assert len(epochs) >= 6
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (len(epochs), 1)))
    assert len({tuple(e) for e in epochs}) == len(epochs)  # reshuffled each time


def test_batch_contents():
    batch = take(1, numbered(10, (4, 4, 1)), 6, 0)[0]
    assert batch["x"].shape == (6, 4, 4, 1)
    assert batch["x"].dtype == np.float32
    assert batch["label"].dtype == batch["index"].dtype == np.int32
    assert batch["index"].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(batch["x"][:, 0, 0, 0], batch["label"])


@pytest.mark.parametrize("start", [1, 3, 17])
def test_resuming_at_any_step_continues_the_same_stream(start):
    source = numbered(11, (2, 2, 1))
    whole = take(start + 4, source, 4, 5, augmentation=FLIP)
    resumed = take(4, source, 4, 5, start, augmentation=FLIP, num_threads=1, prefetch=1)
    for a, b in zip(whole[start:], resumed):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_seed_decides():
    a, b, c = (take(1, numbered(100), 100, s)[0]["label"].tolist() for s in (0, 0, 1))
    assert a == b != c
    assert a != sorted(a)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_partition_the_same_global_batch(count):
    source = numbered(17, (2, 2, 1))
    whole = take(5, source, 6, 0, augmentation=FLIP)
    parts = [
        take(5, source, 6, 0, augmentation=FLIP, process_index=i, process_count=count)
        for i in range(count)
    ]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([p[step][name] for p in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_flips_mirror_half_of_the_images_anew_in_each_epoch():
    n = 400
    image = np.array([-1.0, 0.0, 1.0], np.float32).reshape(1, 1, 3, 1)
    source = sources.from_arrays("ramp", np.repeat(image, n, 0), np.arange(n))
    first, second, again = (
        *take(2, source, n, 0, augmentation=FLIP),
        take(1, source, n, 0, augmentation=FLIP)[0],
    )
    flipped = []
    for batch in (first, second, again):
        row = batch["x"][:, 0, :, 0]
        left = np.all(row == [1, 0, -1], axis=1)
        assert np.all(left | np.all(row == [-1, 0, 1], axis=1))
        assert 0.4 < left.mean() < 0.6
        flipped.append(left[np.argsort(batch["label"])])
    assert 0.4 < np.mean(flipped[0] == flipped[1]) < 0.6
    np.testing.assert_array_equal(flipped[0], flipped[2])


def test_flips_do_not_depend_on_the_batch_size():
    image = np.array([-1.0, 1.0], np.float32).reshape(1, 1, 2, 1)
    source = sources.from_arrays("ramp", np.repeat(image, 12, 0))
    a, b = (
        np.concatenate([x["x"] for x in take(24 // s, source, s, 0, augmentation=FLIP)])
        for s in (4, 6)
    )
    np.testing.assert_array_equal(a, b)


def test_flips_leave_the_source_as_it_is():
    source = numbered(8, (2, 2, 1))
    before = source.all()["x"].copy()
    take(4, source, 8, 0, augmentation=FLIP)
    np.testing.assert_array_equal(source.all()["x"], before)


def test_errors_name_the_value():
    source = numbered(8)
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 8"):
        pipeline.batches(source, 8, 0, process_count=3)
    with pytest.raises(ValueError, match="got 0"):
        pipeline.batches(source, 0, 0)
    with pytest.raises(ValueError, match=r"process_index must be in 0\.\.1, got 2"):
        pipeline.batches(source, 8, 0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="flip needs images"):
        pipeline.batches(source, 8, 0, augmentation=FLIP)
    with pytest.raises(ValueError, match="start_step"):
        pipeline.batches(source, 8, 0, -1)
    with pytest.raises(ValueError, match="empty"):
        pipeline.batches(numbered(0, (2,)), 8, 0)


def test_latents_are_sampled_anew_in_every_epoch():
    n, std = 6, np.array([0.0, 0.5, 2.0], np.float32)

    def read(index):
        mean = np.repeat(index[:, None].astype(np.float32), 3, 1)
        return {"x": mean, "x_std": np.broadcast_to(std, mean.shape), "label": index}

    source = sources.Source("latents", n, (3,), read)
    batches = take(2000, source, 4, 0)
    assert "x_std" not in batches[0]
    noise = np.concatenate([b["x"] - b["label"][:, None] for b in batches])
    np.testing.assert_allclose(np.cov(noise.T), np.diag(std**2), atol=0.12)
    np.testing.assert_array_equal(noise[:, 0], 0)
    assert len(np.unique(noise[:, 1])) > 7900
    # Resuming goes on exactly, and processes share the global batch's noise out.
    again = take(2, source, 4, 0, 1998)
    np.testing.assert_array_equal(again[1]["x"], batches[1999]["x"])
    parts = [take(1, source, 4, 0, process_index=i, process_count=2)[0]["x"] for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), batches[0]["x"])
