"""Tags of captions: what is kept, how often the others are dropped, and that a step decides."""

import dataclasses
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from diffusion.data import batches as pipeline
from diffusion.data import sources
from diffusion.data.batches import Augmentation
from diffusion.data.tags import Tags

CAPTIONS = tuple(f"cat {i}, " + ", ".join("abcdef") for i in range(5))


def split(caption):
    return caption.split(", ")


def test_first_tags_stay_and_every_order_of_the_others_is_as_likely():
    tags, count = Tags(shuffle=True, keep=1), 6000
    changed = [split(tags(" x ,a,b , c", (0, i))) for i in range(count)]
    assert all(caption[0] == "x" and sorted(caption[1:]) == list("abc") for caption in changed)
    orders = Counter("".join(caption[1:]) for caption in changed)
    assert len(orders) == 6
    # 5 standard deviations of a binomial.
    assert all(abs(n - count / 6) < 5 * np.sqrt(count * 5 / 36) for n in orders.values())


def test_tags_are_dropped_at_their_rate_in_order_and_kept_ones_never():
    tags, count = Tags(keep=2, dropout=0.3), 4000
    changed = [split(tags("x, y, a, b, c", (1, i))) for i in range(count)]
    assert all(caption[:2] == ["x", "y"] for caption in changed)
    assert all(caption[2:] == sorted(caption[2:]) for caption in changed)
    for tag in "abc":
        share = np.mean([tag in caption for caption in changed])
        assert abs(share - 0.7) < 5 * np.sqrt(0.21 / count)
    assert Tags(dropout=1.0)("a, b", (0,)) == ""
    assert Tags(dropout=1.0, keep=1)("a", (0,)) == "a"


def captioned():
    """A source whose captions are encoded as the numbers of their letters."""

    def encode(captions):
        rows = [[ord(tag[-1]) for tag in split(c)] for c in captions]
        return {"tokens": np.array([row + [0] * (7 - len(row)) for row in rows], np.int32)}

    x = np.arange(5, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    source = sources.with_columns(sources.from_arrays("tagged", x), encode(CAPTIONS))
    return dataclasses.replace(source, captions=CAPTIONS, encode=encode)


def test_a_step_decides_and_each_epoch_is_new():
    options = {"augmentation": Augmentation(captions=Tags(shuffle=True, keep=1))}
    source = captioned()
    whole = list(itertools.islice(pipeline.batches(source, 5, 0, **options), 8))
    later = list(itertools.islice(pipeline.batches(source, 5, 0, 3, **options), 5))
    for a, b in zip(whole[3:], later):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    halves = [
        pipeline.batch_function(source, 10, 0, process_index=i, process_count=2, **options)(0)
        for i in (0, 1)
    ]
    joined = pipeline.batch_function(source, 10, 0, **options)(0)
    np.testing.assert_array_equal(
        joined["tokens"], np.concatenate([half["tokens"] for half in halves])
    )
    orders = {}
    for batch in whole:
        for x, tokens in zip(batch["x"], batch["tokens"]):
            number = int(x[0])
            assert tokens[0] == ord(str(number))  # a caption stays with its example
            assert sorted(tokens[1:]) == list(map(ord, "abcdef"))
            orders.setdefault(number, set()).add(tuple(tokens))
    assert all(len(found) >= 7 for found in orders.values())  # of 8 epochs
    # Without augmentation captions are as they are.
    plain = next(pipeline.batches(source, 5, 0))["tokens"]
    assert all(list(row[1:]) == list(map(ord, "abcdef")) for row in plain)


def encode_lengths(captions):
    return {"tokens": np.array([[len(c)] for c in captions], np.int32)}


def test_other_processes_have_the_captions():
    source = dataclasses.replace(captioned(), encode=encode_lengths)
    made = pipeline.batch_function(
        source, 5, 0, augmentation=Augmentation(captions=Tags(dropout=0.5))
    )
    stream = pickle.loads(pickle.dumps(made.streams[0]))
    part = np.arange(5)
    for a, b in zip(stream.read(3, part)[0].values(), made.streams[0].read(3, part)[0].values()):
        np.testing.assert_array_equal(a, b)


def test_impossible_tags_are_refused():
    with pytest.raises(ValueError, match="keep=2 has no effect"):
        Tags(keep=2)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\], got 1\.5"):
        Tags(dropout=1.5)
    with pytest.raises(ValueError, match="numbers has none"):
        pipeline.batch_function(
            sources.from_arrays("numbers", np.zeros((4, 2), np.float32)),
            2,
            0,
            augmentation=Augmentation(captions=Tags(shuffle=True)),
        )
