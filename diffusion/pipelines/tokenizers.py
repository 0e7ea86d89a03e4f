"""Tokenizers: those of published pipelines, and CLIP's, from its merges file.

They are ``transformers``' tokenizers, which need no PyTorch.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusion.pretrained import hub

# transformers warns that there is no PyTorch, which tokenizers do not need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = 256
CLIP = "openai/clip-vit-large-patch14"


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder such as a pipeline's ``tokenizer`` or ``tokenizer_3``.

    Reads CLIP's (vocab.json and merges.txt, or tokenizer.json) and T5's (tokenizer.json).

    Raises:
      ValueError: there is none.
    """
    from transformers import AutoTokenizer, CLIPTokenizer

    folder = Path(folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return CLIPTokenizer.from_pretrained(folder)
    if (folder / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise ValueError(
        f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt; "
        f"found {found}"
    )


def clip_tokenizer(
    merges: str | Path | Iterable[str],
    *,
    vocab_size: int = 49_408,
    length: int = 77,
    pad: str = END,
) -> Any:
    """CLIP's tokenizer: byte pairs of lower-cased text (Radford et al., 2021).

    Ids are OpenAI's: the bytes, the bytes at the end of a word, the merges in order, start, end.
    ``tokenizer.save_pretrained(folder)`` writes what ``load_tokenizer`` reads.

    Args:
      merges: OpenAI's ``bpe_simple_vocab_16e6.txt.gz``, or the merges themselves, "t h", in order.
      vocab_size: all ids; fewer merges make a smaller vocabulary, with which a text encoder that
        is trained from scratch has fewer embeddings, and texts have more tokens.
      length: tokens of a prompt, with start and end.
      pad: what fills it up: the end in SD 1 and SDXL's first encoder, "!" in SD 2 and SDXL's
        second.

    Raises:
      ValueError: ``vocab_size`` has no room for the bytes, or more than there are merges.
    """
    from transformers import CLIPTokenizer

    if isinstance(merges, (str, Path)):
        with gzip.open(merges, "rt", encoding="utf-8") as lines:
            merges = lines.read().split("\n")[1:]  # the first line is the version
    merges = [line for line in merges if line]
    count = vocab_size - 2 * BYTES - 2
    if not 0 <= count <= len(merges):
        raise ValueError(
            f"vocab_size={vocab_size}; expected {2 * BYTES + 2} to {2 * BYTES + 2 + len(merges)}, "
            f"from {len(merges)} merges"
        )
    merges = [tuple(line.split()) for line in merges[:count]]
    letters = _letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=length)


def _letters() -> list[str]:
    """A printable letter for each byte, in the order of OpenAI's ids: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(BYTES + n) for n in range(BYTES - len(printable))]


def clip_tokenizer_at(where: str, pad: str = END) -> Any:
    """CLIP's tokenizer from a folder, OpenAI's merges file or, for an empty ``where``, the hub.

    Raises:
      FileNotFoundError: there is none.
    """
    if where and Path(where).is_file():
        return clip_tokenizer(where, pad=pad)
    try:
        tokenizer = load_tokenizer(hub.locate(where or CLIP, weights=False))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "a single file holds no tokenizer: name CLIP's folder, or the path of "
            f"bpe_simple_vocab_16e6.txt.gz ({error})"
        ) from None
    tokenizer.pad_token = pad
    return tokenizer
