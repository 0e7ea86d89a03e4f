"""Captions as numbers: token ids of one length, of a whole vocabulary or of the words in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Tokenize = Callable[[Sequence[str]], dict[str, np.ndarray]]


def tokenizer(transformer: Any, length: int) -> Tokenize:
    """Captions -> ``tokens`` [N, length] int32 and ``context_mask`` [N, length] bool.

    ``transformer`` is a tokenizer of ``transformers``; ``length`` counts start and end. Longer
    captions are cut and keep their end token. Shorter ones are padded; the mask is False there.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3 (start, a token, end), got {length}")
    if transformer.pad_token is None:
        raise ValueError("the tokenizer has no token to pad captions with (pad_token)")

    def tokenize(captions: Sequence[str]) -> dict[str, np.ndarray]:
        ids = transformer(
            list(captions), padding="max_length", truncation=True, max_length=length, verbose=False
        )
        mask = np.array(ids["attention_mask"], bool)
        return {"tokens": np.array(ids["input_ids"], np.int32), "context_mask": mask}

    return tokenize


def vocabulary(tokenize: Tokenize, captions: Sequence[str]) -> np.ndarray:
    """The ids [K] of the tokens that ``captions`` and the empty one use, in order."""
    return np.unique(tokenize([*captions, ""])["tokens"])


def compacted(
    tokenize: Tokenize, used: np.ndarray, captions: Sequence[str]
) -> dict[str, np.ndarray]:
    """``tokenize(captions)`` with ids 1..K of the tokens ``used`` [K], and 0 for all others.

    They keep their order, so that CLIP's end is still the largest. A text encoder trained from
    scratch learns nothing of tokens that it never sees: without them its embedding is a small part
    of CLIP's 49,408 rows.
    """
    result = tokenize(captions)
    place = np.searchsorted(used, result["tokens"]).clip(max=len(used) - 1)
    known = used[place] == result["tokens"]
    return result | {"tokens": np.where(known, place + 1, 0).astype(np.int32)}
