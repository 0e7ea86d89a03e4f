"""Captions as numbers: token ids of one length, of a whole vocabulary or of the words in use."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Encode = Callable[[str], list[int]]  # ids, with those of the start and the end around them
Tokenize = Callable[[Sequence[str]], dict[str, np.ndarray]]

CLIP_MERGES = 49152 - 256 - 2  # of the file's 262,144, those that CLIP's vocabulary is made of


def clip_encoder(path: str | Path) -> Encode:
    """CLIP's byte-pair encoding: <|startoftext|>, the text in lower case, <|endoftext|>.

    Args:
      path: ``bpe_simple_vocab_16e6.txt.gz`` (OpenAI's CLIP repository), or a folder with a
        tokenizer as transformers saves it.

    Raises:
      FileNotFoundError: there is neither.
    """
    from transformers import CLIPTokenizer

    path = Path(path)
    if path.is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(str(path))
    elif path.is_file():
        vocabulary, merges = _clip_vocabulary(path)
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    else:
        raise FileNotFoundError(
            f"no tokenizer at {path}: expected bpe_simple_vocab_16e6.txt.gz, as in OpenAI's CLIP "
            "repository, or a folder with a tokenizer of transformers"
        )
    return lambda text: tokenizer(text)["input_ids"]


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


def _clip_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token: 256 bytes, the same at a word's end, the merges, start and end."""
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : CLIP_MERGES + 1]]
    # Bytes are written as printable characters: themselves where they are, else from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    rest = [byte for byte in range(256) if byte not in printable]
    characters = [*map(chr, printable), *(chr(256 + i) for i in range(len(rest)))]
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges
