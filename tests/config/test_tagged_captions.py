"""Tags that config.data shuffles and drops are tokenised anew in every epoch."""

import dataclasses
import itertools

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from configs import emoji_text_to_image
from diffusion.config.data import augmentation, batches, make_source
from diffusion.data import templates

TAGS = ("cat", "red", "small", "sitting", "night")


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 4, 4, 3), np.uint8)
    captions = np.array([", ".join((name, *TAGS)) for name in ("dog", "house") * 4])
    np.savez(tmp_path / "pairs.npz", images=images, caption=captions)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    c = emoji_text_to_image.get_config()
    c.data.update(name="captioned", dir=str(tmp_path / "pairs.npz"), held_out=0.2, size=4)
    c.data.update(tokenizer=str(tmp_path / "tokenizer"), autoencoder="", cache="")
    c.train.batch_size = 4
    return c


def test_tags_are_shuffled_dropped_and_kept(config):
    config.data.update(shuffle_tags=True, keep_tags=2, tag_dropout=0.5)
    source = make_source(config.data, "train")
    first = next(iter(source.captions)).split(", ")[:2]
    begin = source.encode([", ".join(first) + ","])["tokens"][0, :4]  # start, a word, comma, a word
    seen = [b["tokens"] for b in itertools.islice(batches(config, source, 0), 6)]
    for tokens in np.concatenate(seen):
        np.testing.assert_array_equal(tokens[:4], begin)
    assert len({tuple(row) for row in np.concatenate(seen)}) > 10
    lengths = np.concatenate(
        [b["context_mask"].sum(1) for b in itertools.islice(batches(config, source, 0), 6)]
    )
    assert lengths.min() < lengths.max() <= source.encode(source.captions[:1])["context_mask"].sum()


def test_a_word_stands_in_other_sentences_each_time(config):
    config.data.update(template="object", size=4)
    source = make_source(config.data, "train")
    source = dataclasses.replace(source, captions=("cat",) * len(source))
    seen = [b["tokens"] for b in itertools.islice(batches(config, source, 0), 6)]
    assert len({tuple(row) for row in np.concatenate(seen)}) > 5
    again = [b["tokens"] for b in itertools.islice(batches(config, source, 3), 3)]
    np.testing.assert_array_equal(again, seen[3:])
    made = {templates.Template("style")("<s>", (0, i)) for i in range(500)}
    assert made == {sentence.format("<s>") for sentence in templates.STYLE}
    assert (len(templates.OBJECT), len(templates.STYLE)) == (27, 19)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "objects"}, "Did you mean 'object'"),
        ({"template": "style", "shuffle_tags": True}, "its sentences are no tags"),
        ({"keep_tags": 1}, "config.data.shuffle_tags, keep_tags, tag_dropout: keep=1"),
        ({"shuffle_tags": True, "text_encoder": "folder", "workers": 1}, "config.data.workers=1"),
    ],
)
def test_tags_that_cannot_act_are_refused(config, fields, message):
    config.data.update(fields)
    with pytest.raises(ValueError, match=message):
        augmentation(config.data)
