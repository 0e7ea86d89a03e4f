"""Files of textual inversion (Gal et al., 2023): embeddings of new words, for CLIP's text encoders.

Three layouts of safetensors are read and written: {token: (k, d)} of diffusers, which may hold
several words; {"emb_params": (k, d)} of kohya's scripts and AUTOMATIC1111's web UI; and for SDXL
{"clip_l": (k, 768), "clip_g": (k, 1280)}. Only the first names the word; that of the others is in
the metadata of files that are written here, else it is the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.pretrained import files

PARAMS = ("emb_params", "string_to_param.*", "*")
PAIR = ("clip_l", "clip_g")
LAYER = re.compile(
    r"bundle_emb\..*|.*\.(weight|bias|alpha|diff(_b)?|[wb]_norm|(lora|hada|lokr|dora)_\w+)"
)
"""Names of tensors of a network's layers, which are no words; a word may have dots, too."""
TOKEN = "token"
"""The word, in the metadata."""
LAYOUTS = ("diffusers", "kohya")


class Word(NamedTuple):
    """A new word.

    Attributes:
      token: how prompts write it.
      rows: for each text encoder its embeddings (k, d).
    """

    token: str
    rows: tuple[np.ndarray, ...]


def holds(path: str | Path) -> bool:
    """Whether a file holds embeddings of words, by the shapes and names of its tensors."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    tensors = files.open_file(path)
    if set(tensors) == set(PAIR) or any(name in tensors for name in PARAMS):
        return True
    plain = all(len(t.shape) in (1, 2) for t in tensors.values())
    widths = {t.shape[-1:] for t in tensors.values()}
    return plain and len(widths) == 1 and not any(map(LAYER.fullmatch, tensors))


def read(path: str | Path, token: str = "") -> list[Word]:
    """The words in a file; ``token`` is how to write one that is alone in it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a pickle, a damaged file, one without embeddings, or with numbers that are not
        finite.
    """
    path = Path(path)
    if path.suffix in files.PICKLES:
        raise files.refuse_pickle(path)
    arrays = {name: np.asarray(t) for name, t in files.open_file(path).items()}
    for name, array in arrays.items():
        if array.ndim not in (1, 2) or not array.size:
            raise ValueError(f"{path}: {name!r} has shape {array.shape}; expected (k, d)")
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{path}: {name!r} holds numbers that are not finite")
    rows = {name: np.atleast_2d(array).astype(np.float32) for name, array in arrays.items()}
    named = next((name for name in PARAMS if name in rows), None)
    usual = files.metadata(path).get(TOKEN) or path.stem
    if set(rows) == set(PAIR):
        counts = [len(rows[name]) for name in PAIR]
        if counts[0] != counts[1]:
            raise ValueError(f"{path}: clip_l has {counts[0]} rows, clip_g {counts[1]}")
        words = [Word(usual, tuple(rows[name] for name in PAIR))]
    elif named is not None:
        words = [Word(usual, (rows[named],))]
    else:
        words = [Word(name, (array,)) for name, array in rows.items()]
    if not words:
        raise ValueError(f"{path} holds no embeddings")
    if not token:
        return words
    if len(words) > 1:
        known = ", ".join(word.token for word in words)
        raise ValueError(f"{path} holds several words, {known}; token={token!r} is for one")
    return [words[0]._replace(token=token)]


def write(path: str | Path, words: Sequence[Word], layout: str = "diffusers") -> None:
    """Writes words for diffusers or for kohya's scripts; those of two encoders are SDXL's.

    Raises:
      ValueError: several words in a layout that has place for one.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}; choose one of {', '.join(LAYOUTS)}")
    pair = any(len(word.rows) > 1 for word in words)
    if len(words) > 1 and (pair or layout == "kohya"):
        raise ValueError(f"{len(words)} words; this layout holds one in a file")
    arrays: Mapping[str, np.ndarray]
    if pair:
        arrays = dict(zip(PAIR, words[0].rows))
    elif layout == "kohya":
        arrays = {PARAMS[0]: words[0].rows[0]}
    else:
        arrays = {word.token: word.rows[0] for word in words}
    tensors = {name: files.of_array(np.asarray(a, np.float32)) for name, a in arrays.items()}
    about = {TOKEN: words[0].token} if pair or layout == "kohya" else {}
    files.write_file(path, tensors, files.PYTORCH | about)
