"""From ``config.data`` to captioned images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion.data import captions as captioned
from diffusion.data import sources, tokens
from diffusion.data.sources import Source
from diffusion.errors import field
from diffusion.pipelines import description

PAIRS = ("captioned", "emoji", "tiles", "emoji_and_tiles")


def make_source(c: ConfigDict, split: str) -> Source:
    """The captioned images of config.data: "train" or "test", tokenised if a tokenizer is given."""
    if not c.dir:
        raise ValueError("config.data.dir must say where the captioned images are (.npz)")
    read = {
        "captioned": [(captioned.read, "")],
        "emoji": [(captioned.read, "")],
        "tiles": [(captioned.tiles, "")],
        "emoji_and_tiles": [(captioned.read, "emoji"), (captioned.tiles, "dcss_tiles")],
    }[c.name]
    parts = [function(Path(c.dir) / folder) for function, folder in read]
    found = {p.images.shape[1:3] for p in parts}
    if not c.size and (len(found) > 1 or len(set(next(iter(found)))) > 1):
        raise ValueError(f"config.data.size must be set for images of the sizes {sorted(found)}")
    size = c.size or next(iter(found))[0]
    pairs = captioned.Pairs(
        np.concatenate([captioned.resize(p.images, size, c.background) for p in parts]),
        sum((p.captions for p in parts), ()),
    )
    chosen = captioned.split(pairs, split, c.held_out)
    made = sources.from_arrays(c.name, chosen.images)
    made = dataclasses.replace(made, captions=chosen.captions)
    return tokenized(c, made, captioned.split(pairs, "train", c.held_out).captions)


def tokenized(c: ConfigDict, source: Source, known: Sequence[str]) -> Source:
    """A captioned source with tokens, if a tokenizer is given; captions then stand for labels.

    Args:
      c: config.data.
      source: with captions.
      known: captions of the training split, which the vocabulary is made of.
    """
    if c.text_encoder and not c.tokenizer:
        raise ValueError("config.data.text_encoder needs config.data.tokenizer")
    if not c.tokenizer:
        return source
    with field(f"config.data.tokenizer={c.tokenizer!r}, tokens={c.tokens}"):
        tokenize = tokens.tokenizer(description.tokenizer(c.tokenizer), c.tokens)
    vocabulary: tuple[int, ...] = ()
    if not c.text_encoder:  # which knows every token
        used = tokens.vocabulary(tokenize, known)
        tokenize, vocabulary = partial(tokens.compacted, tokenize, used), tuple(used.tolist())
    made = sources.with_columns(source, tokenize(source.captions), without=("label",))
    return dataclasses.replace(
        made, num_classes=0, class_names=(), encode=tokenize, vocabulary=vocabulary
    )
