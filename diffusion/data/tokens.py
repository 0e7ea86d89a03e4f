"""Captions as numbers: token ids of one length, of a whole vocabulary or of the words in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Tokenize = Callable[[Sequence[str]], dict[str, np.ndarray]]


def tokenizer(transformer: Any, length: int) -> Tokenize:
    """Captions -> ``tokens`` [N, length] int32 and ``context_mask`` [N, length] bool.

    Longer captions are cut and keep their end token. Shorter ones are padded; the mask is False at
    the padding.

    Args:
      transformer: a tokenizer of ``transformers``.
      length: of all captions in tokens, start and end included.

    Raises:
      ValueError: ``length`` leaves no room for a token, or the tokenizer has no padding token.
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


def compact(tokenize: Tokenize, captions: Sequence[str]) -> tuple[Tokenize, int]:
    """``tokenize`` with new ids 1..K - 1 for the tokens that ``captions`` use, and K.

    The tokens keep their order, so that CLIP's end is still the largest id. Id 0 stands for all
    other tokens. A text encoder that is trained from scratch learns nothing about tokens that it
    never sees; without them its embedding is a small part of CLIP's 49,408 rows.
    """
    used = np.unique(tokenize([*captions, ""])["tokens"])

    def tokenize_compactly(captions: Sequence[str]) -> dict[str, np.ndarray]:
        result = tokenize(captions)
        place = np.searchsorted(used, result["tokens"]).clip(max=len(used) - 1)
        known = used[place] == result["tokens"]
        return result | {"tokens": np.where(known, place + 1, 0).astype(np.int32)}

    return tokenize_compactly, len(used) + 1
