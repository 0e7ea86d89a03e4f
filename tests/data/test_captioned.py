"""Captioned images: what is read, how it is laid out, split and tokenised."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from configs import base
from diffusion.config.data import make_source
from diffusion.data import captions as captioned
from diffusion.data import tokens

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
BPE = REAL / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
needs_real = pytest.mark.skipif(not BPE.exists(), reason="the real data are absent")


def save(path, images, captions, **others):
    np.savez(path, images=images, caption=np.array(captions), **others)
    return path


def test_transparent_images_lie_on_the_background():
    images = np.zeros((1, 2, 2, 4), np.uint8)
    images[0, 0, 0] = (200, 100, 0, 255)
    images[0, 0, 1] = (200, 100, 0, 51)  # a fifth
    laid = captioned.resize(images, 2, (100, 200, 255))
    np.testing.assert_array_equal(laid[0, 0], [[200, 100, 0], [120, 180, 204]])
    np.testing.assert_array_equal(laid[0, 1], [[100, 200, 255]] * 2)


def test_resizing_by_whole_factors_is_exact():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 4, 3), np.uint8)
    smaller = captioned.resize(images, 2, (0, 0, 0))
    means = images.reshape(3, 2, 2, 2, 2, 3).mean((2, 4))
    assert np.abs(smaller - means).max() <= 1  # rounded once per axis
    larger = captioned.resize(images, 8, (0, 0, 0))
    np.testing.assert_array_equal(larger[:, ::2, ::2], images)
    np.testing.assert_array_equal(larger[:, 1::2, 1::2], images)
    grey = captioned.resize(images[..., :1], 4, (0, 0, 0))
    np.testing.assert_array_equal(grey, np.repeat(images[..., :1], 3, -1))


def test_held_out_captions_are_unseen_and_made_of_seen_words():
    colours, things = ("red", "green", "blue", "black", "white"), ("heart", "square", "book", "car")
    captions = [f"{a} {b}" for a in colours for b in things] + ["Red Heart", "a unique thing"]
    held_out = captioned.held_out_captions(captions, 0.2)
    assert len(held_out) == 5  # a fifth of 21 different ones, rounded up
    images = np.arange(len(captions), dtype=np.uint8).reshape(-1, 1, 1, 1)
    pairs = captioned.Pairs(images, tuple(captions))
    train, test = (captioned.split(pairs, name, 0.2) for name in ("train", "test"))
    assert {c.lower() for c in test.captions} == held_out
    assert not held_out & {c.lower() for c in train.captions}
    assert len(train.captions) + len(test.captions) == len(captions)
    assert [captions[i] for i in test.images.ravel()] == list(test.captions)
    for word in {w for caption in held_out for w in caption.split()}:
        assert len({c.lower() for c in train.captions if word in c.lower().split()}) >= 3
    # The order of the data does not matter.
    assert captioned.held_out_captions(captions[::-1], 0.2) == held_out
    # Where no caption is made of common words, one is held out all the same.
    assert len(captioned.held_out_captions(["one", "two", "three"], 0.9)) == 1


def test_files_of_a_folder_are_joined(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 2, 2, 4), np.uint8)
    kinds = dict(category=np.array(["player", "item", "item", "UNUSED"]))
    save(tmp_path / "a.npz", images, ["w", "x", "UNUSED y", "z"], **kinds)
    save(tmp_path / "b.npz", images[:1], ["v"])
    assert captioned.read(tmp_path).captions == ("w", "x", "UNUSED y", "z", "v")
    kept = captioned.tiles(tmp_path)
    assert kept.captions == ("x", "v")
    np.testing.assert_array_equal(kept.images, images[[1, 0]])


@pytest.mark.parametrize(
    "images, captions, message",
    [
        (np.zeros((2, 4, 4, 3), np.float32), ["a", "b"], "must be uint8"),
        (np.zeros((2, 4, 4, 2), np.uint8), ["a", "b"], "must be uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), ["a"], "must be 2 strings"),
        (np.zeros((2, 4, 4, 3), np.uint8), [1, 2], "must be 2 strings"),
    ],
)
def test_malformed_files_are_refused(tmp_path, images, captions, message):
    with pytest.raises(ValueError, match=message):
        captioned.read(save(tmp_path / "bad.npz", images, captions))


def test_absent_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz with .images."):
        captioned.read(tmp_path / "none.npz")
    config = base.get_config()
    config.data.name = "captioned"
    with pytest.raises(ValueError, match=r"config\.data\.dir must say"):
        make_source(config.data, "train")


def test_tokens_have_one_length_and_keep_the_end():
    tokenizer = tiny_tokenizer()
    start, dog, red, end = tokenizer("dog red")["input_ids"]
    batch = tokens.tokenizer(tokenizer, 4)(["", "dog", "dog red", "dog red dog red"])
    np.testing.assert_array_equal(
        batch["tokens"],
        [[start, end, end, end], [start, dog, end, end], *2 * [[start, dog, red, end]]],
    )
    np.testing.assert_array_equal(batch["context_mask"].sum(1), [2, 3, 4, 4])
    assert batch["tokens"].dtype == np.int32 and batch["context_mask"][1].tolist()[2:] == [1, 0]
    with pytest.raises(ValueError, match="at least 3"):
        tokens.tokenizer(tokenizer, 2)


def test_tokens_are_filled_up_as_the_tokenizer_says():
    tokenizer = tiny_tokenizer(pad="!")
    batch = tokens.tokenizer(tokenizer, 5)(["dog"])
    assert batch["tokens"][0, 3:].tolist() == [tokenizer.pad_token_id] * 2
    assert tokenizer.pad_token_id != batch["tokens"][0, 2]
    assert batch["context_mask"].tolist() == [[True, True, True, False, False]]


def test_compact_tokens_are_numbered_in_order_and_others_are_unknown():
    tokenizer = tiny_tokenizer()
    words = ["river", "dog", "house"]
    order = np.argsort([tokenizer(word)["input_ids"][1] for word in words])
    tokenize = tokens.tokenizer(tokenizer, 6)
    used = tokens.vocabulary(tokenize, ["river dog", "house"])
    assert len(used) == 5  # three words, start, end
    compact = partial(tokens.compacted, tokenize, used)
    ids = 1 + np.argsort(order)
    found = compact(["house river red dog"])["tokens"][0]
    np.testing.assert_array_equal(found, [4, ids[2], ids[0], 0, ids[1], 5])
    np.testing.assert_array_equal(compact([""])["tokens"], [[4, 5, 5, 5, 5, 5]])


@needs_real
def test_emoji_and_tiles_as_a_config_names_them():
    c = base.get_config().data
    c.update(name="emoji_and_tiles", dir=str(REAL), tokenizer=str(BPE), size=32)
    train, test = make_source(c, "train"), make_source(c, "test")
    assert train.shape == (32, 32, 3) and len(train) + len(test) == 1637 + 326 + 3113
    assert not {x.lower() for x in train.captions} & {x.lower() for x in test.captions}
    assert not any("unused" in x.lower() for x in train.captions)
    batch = train.read(np.array([5, 3]))
    assert batch["tokens"].shape == batch["context_mask"].shape == (2, 20)
    np.testing.assert_array_equal(
        train.encode([train.captions[3]])["tokens"][0], train[3]["tokens"]
    )
    # Token ids in use are numbered from 1 in order, so CLIP's start and end come last.
    start, end = len(train.vocabulary) - 1, len(train.vocabulary)
    assert batch["tokens"][0, 0] == start and batch["tokens"][0, -1] == end
    assert batch["x"].min() >= -1 and batch["x"].max() <= 1
    assert train.vocabulary == test.vocabulary and train.all()["tokens"].max() == end
    # Held-out captions are made of words that were seen: nearly all of their tokens are known.
    assert (test.all()["tokens"] == 0).mean() < 0.001


@needs_real
@pytest.mark.parametrize("path", ["nowhere", "nowhere.txt.gz"])
def test_an_absent_tokenizer_is_named(path):
    c = base.get_config().data
    c.update(name="emoji", dir=str(REAL / "emoji"), tokenizer=path)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"data\.tokenizer='nowhere.*there is no"
    ):
        make_source(c, "train")
