"""Feature networks whose weights lie in a folder of transformers' or diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.pretrained import models


def opened(path_or_id: str, expected: str) -> tuple[models.Model, tuple[Path, ...]]:
    """A model of the class ``expected``, not read yet, and the files of its weights.

    Raises:
      FileNotFoundError, ValueError: there is none, as in ``models.open_model``.
    """
    model = models.open_model(path_or_id, expected=expected)
    return model, tuple(sorted(Path(model.source).glob("*.safetensors")))


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, with products of matrices in full float32 on every device."""
    compiled = jax.jit(function)

    def run(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return compiled(*arguments)

    return run


class Lazy(dict):
    """Outputs that are computed when they are looked up: {name: function of no arguments}."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)()


def tokens(
    network: str, folder: str | Path, length: int
) -> Callable[[Sequence[Any]], tuple[np.ndarray, np.ndarray]]:
    """Captions -> ids [B, length] and their mask, by the tokenizer in a folder.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
      ValueError: later, from what it returns: a subject is no text.
    """
    from transformers import AutoTokenizer, CLIPTokenizer

    from diffusion.data.tokens import tokenizer

    files = [Path(folder) / name for name in ("vocab.json", "merges.txt", "tokenizer.json")]
    if all(path.is_file() for path in files[:2]):
        tokenize = tokenizer(CLIPTokenizer.from_pretrained(folder), length)
    elif files[2].is_file():
        tokenize = tokenizer(AutoTokenizer.from_pretrained(folder), length)
    else:
        raise FileNotFoundError(
            f"{network} encodes captions with the tokenizer in {folder}; there is no "
            "tokenizer.json, nor vocab.json and merges.txt"
        )

    def encode(subjects: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        wrong = [subject for subject in subjects if not isinstance(subject, str)]
        if wrong:
            raise ValueError(f"{network} encodes captions; an example's subject is {wrong[0]!r}")
        given = tokenize(subjects)
        return given["tokens"], given["context_mask"]

    return encode
