"""Captions as numbers: token ids of one length, of a whole vocabulary or of the words in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Encode = Callable[[str], list[int]]  # ids, with those of the start and the end around them
Tokenize = Callable[[Sequence[str]], dict[str, np.ndarray]]


def tokenizer(encode: Encode, length: int) -> Tokenize:
    """Captions -> ``tokens`` [N, length] int32 and ``context_mask`` [N, length] bool.

    Longer captions are cut and keep their last id, the end; shorter ones are filled up with it, as
    CLIP's are, and the mask, True up to the first end, leaves those out.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3 (start, a token, end), got {length}")

    def tokenize(captions: Sequence[str]) -> dict[str, np.ndarray]:
        tokens = np.empty((len(captions), length), np.int32)
        mask = np.zeros((len(captions), length), bool)
        for row, kept, caption in zip(tokens, mask, captions):
            ids = encode(caption)
            if len(ids) > length:
                ids = [*ids[: length - 1], ids[-1]]
            row[: len(ids)], row[len(ids) :] = ids, ids[-1]
            kept[: len(ids)] = True
        return {"tokens": tokens, "context_mask": mask}

    return tokenize


def compact(tokenize: Tokenize, captions: Sequence[str]) -> tuple[Tokenize, int]:
    """The same with ids 0..K - 1 of the tokens that ``captions`` use, and K.

    They keep their order, so that CLIP's end is still the largest. Id 0 stands for all others. A
    text encoder trained from scratch learns nothing of tokens that it never sees: without them its
    embedding is a small part of CLIP's 49,408 rows.
    """
    used = np.unique(tokenize([*captions, ""])["tokens"])

    def tokenize_compactly(captions: Sequence[str]) -> dict[str, np.ndarray]:
        result = tokenize(captions)
        place = np.searchsorted(used, result["tokens"]).clip(max=len(used) - 1)
        known = used[place] == result["tokens"]
        return result | {"tokens": np.where(known, place + 1, 0).astype(np.int32)}

    return tokenize_compactly, len(used) + 1
