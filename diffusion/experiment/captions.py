"""From ``config.data`` to captioned images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion.data import captioned, tokens
from diffusion.data.sources import Source
from diffusion.experiment import latents
from diffusion.pipelines.tokenizers import clip_tokenizer, load_tokenizer

NAMES = ("captioned", "emoji", "tiles", "emoji_and_tiles")


def make_source(c: ConfigDict, split: str) -> Source:
    """The captioned images of config.data: "train" or "test", tokenised if a tokenizer is given."""
    if not c.dir:
        raise ValueError("config.data.dir must say where the captioned images are (.npz)")
    if c.size < 1:
        raise ValueError(f"config.data.size must be positive, got {c.size}")
    if len(c.background) != 3 or not all(0 <= v <= 255 for v in c.background):
        raise ValueError(f"config.data.background must be (R, G, B) in 0..255, got {c.background}")
    read = {
        "captioned": [(captioned.read, "")],
        "emoji": [(captioned.emoji, "")],
        "tiles": [(captioned.tiles, "")],
        "emoji_and_tiles": [(captioned.emoji, "emoji"), (captioned.tiles, "dcss_tiles")],
    }[c.name]
    parts = [function(Path(c.dir) / folder) for function, folder in read]
    pairs = captioned.Pairs(
        np.concatenate([captioned.resize(p.images, c.size, c.background) for p in parts]),
        sum((p.captions for p in parts), ()),
    )
    chosen = captioned.split(pairs, split, c.held_out)
    if c.text_encoder and not c.tokenizer:
        raise ValueError("config.data.text_encoder needs config.data.tokenizer")
    if not c.tokenizer:
        return captioned.source(c.name, chosen)
    tokenize = tokens.tokenizer(_encoder(c.tokenizer), c.tokens)
    if c.text_encoder:  # it knows every token
        return captioned.source(c.name, chosen, tokenize)
    return captioned.source(
        c.name,
        chosen,
        *tokens.compact(tokenize, captioned.split(pairs, "train", c.held_out).captions),
    )


def _encoder(path: str) -> tokens.Encode:
    """Text -> CLIP's ids, start and end included."""
    if Path(path).is_file():
        tokenizer = clip_tokenizer(path)
    elif path.endswith(".gz"):
        raise FileNotFoundError(
            f"config.data.tokenizer={path!r}: there is no such file; CLIP's "
            "bpe_simple_vocab_16e6.txt.gz is in OpenAI's repository"
        )
    else:
        tokenizer = load_tokenizer(latents.located(path, "config.data.tokenizer"))
    return lambda text: tokenizer(text)["input_ids"]
