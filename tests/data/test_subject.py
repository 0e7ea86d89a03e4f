"""DreamBooth's data: every second example is of the class, wherever batches are cut."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffusion.data import batches as pipeline
from diffusion.data import folder, image_source, sources, subject
from diffusion.data.batches import Augmentation


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """3 pictures of a subject, of grey levels 0 to 2, and 7 of its class, of 100 to 106."""
    root = tmp_path_factory.mktemp("subject")
    for name, first, count in (("own", 0, 3), ("class", 100, 7)):
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            place = root / name / ("deeper" if i == count - 1 else "")
            Image.fromarray(np.full((4, 4, 3), first + i, np.uint8)).save(place / f"{i}.png")
    (root / "own" / "notes.txt").write_text("no picture")
    own, of_class = (folder.pictures(root / name) for name in ("own", "class"))
    made = subject.source("pet", own, "a sks dog", of_class, "a dog")
    made = sources.with_columns(made, {"tokens": np.arange(10)})
    return image_source.resized(made, (4, 4, 3))


def levels(batch):
    """The grey level of each picture."""
    return np.round((batch["x"][:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def take(n, *args, **options):
    return list(itertools.islice(pipeline.batches(*args, **options), n))


def test_halves_are_interleaved_and_each_has_its_own_epochs(source):

    assert source.captions == 3 * ("a sks dog",) + 7 * ("a dog",)
    seen = take(21, source, 4, 0)
    for batch in seen:
        np.testing.assert_array_equal(batch["prior"], [0, 1, 0, 1])
        assert [level >= 100 for level in levels(batch)] == [False, True, False, True]
        # Columns that were added later belong to the same pictures.
        assert [k if k < 3 else 97 + k for k in batch["tokens"]] == levels(batch)
    counted = Counter(level for batch in seen for level in levels(batch))
    assert all(counted[level] == 42 / 3 for level in range(3))
    assert all(counted[level] == 42 / 7 for level in range(100, 107))


def test_the_stream_is_that_of_the_step_in_any_number_of_processes(source):
    options = {"augmentation": Augmentation(flip=True)}
    whole = take(5, source, 8, 3, **options)
    for a, b in zip(whole[2:], take(3, source, 8, 3, 2, **options)):
        np.testing.assert_array_equal(a["x"], b["x"])
    parts = [take(5, source, 8, 3, process_index=i, process_count=2, **options) for i in (0, 1)]
    for one, *halves in zip(whole, *parts):
        for name in ("x", "prior", "tokens", "index"):
            np.testing.assert_array_equal(one[name], np.concatenate([h[name] for h in halves]))
    other = take(1, source, 8, 4, **options)[0]
    assert levels(other) != levels(whole[0])


def test_examples_of_a_step_are_named_and_other_processes_read_them(source):
    made = pipeline.batch_function(source, 6, 0)
    of, index = made.examples(2)
    captions = [of.captions[i] for i in index]
    assert captions == 3 * ["a sks dog", "a dog"]
    copy = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(copy(2)["x"], made(2)["x"])
    np.testing.assert_array_equal(made(2)["tokens"], index)


def test_the_subject_alone_has_no_class(source, tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "1.png")
    alone = subject.source("pet", folder.pictures(tmp_path), "a sks dog")
    alone = image_source.resized(alone, (4, 4, 3))
    assert alone.shares == () and "prior" not in take(1, alone, 3, 0)[0]


def test_batches_that_cannot_be_halved_are_refused(source):
    with pytest.raises(ValueError, match="batch_size=5: each process's part"):
        pipeline.batch_function(source, 5, 0)
    with pytest.raises(ValueError, match="multiple of 2"):
        pipeline.batch_function(source, 2, 0, process_index=0, process_count=2)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder.pictures("nowhere")
