"""New words of prompts: textual inversion (Gal et al., 2023), read from files or trained.

A word stands for one or several rows, which are put behind those that a text encoder has. Where a
prompt holds the word, between other words or signs, it is replaced by the rows' numbers; a word
that only contains it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion.adapters.adapter import Params
from diffusion.errors import check_range
from diffusion.levels import Array
from diffusion.models.text_to_image import TextToImage
from diffusion.pipelines.conditioners import Captions, Conditioner
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pipelines.prompts import split
from diffusion.pretrained.adapters.embeddings import Word

TABLE = "embeddings/token_embedding/embedding"
"""The end of the path of a text encoder's rows."""


@dataclass(frozen=True)
class Concept:
    """A word that a pipeline learns when it is loaded."""

    word: Word

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline whose prompts may hold the word."""
        count = len(self.word.rows[0])
        network, conditioner = pipeline.network, pipeline.conditioner
        if hasattr(conditioner, "encoders"):
            return replace(pipeline, conditioner=conditioner.with_word(self.word.token, count))
        conditioner, text = _own(conditioner, network.text, self.word.token, count)
        return replace(pipeline, conditioner=conditioner, network=network.clone(text=text))

    def load(self, params: Params) -> Params:
        """The parameters with the word's rows."""
        if params.get("encoders"):
            trees = zip(params["encoders"], self.word.rows)
            return {**params, "encoders": [_with_rows(tree, [rows]) for tree, rows in trees]}
        network = params["network"]
        text = _with_rows(network["text"], self.word.rows)
        return {**params, "network": {**network, "text": text}}


def check(pipeline: Pipeline, word: Word, path: str) -> None:
    """Raises ValueError unless the pipeline's text encoders take such a word."""
    widths = [encoder.width for encoder in text_encoders(pipeline)]
    given = [rows.shape[1] for rows in word.rows]
    if not widths:
        raise ValueError(f"{path}: {word.token!r} is for prompts, and this model takes none")
    if widths != given:
        made = {1024: "Stable Diffusion 2", 768: "Stable Diffusion 1"}
        base = "SDXL" if len(given) == 2 else made.get(given[0], "another text encoder")
        raise ValueError(
            f"{path}: {word.token!r} was made for {base}, with embeddings of {given} numbers; "
            f"those of this model have {widths}"
        )
    if word.token in known_words(pipeline):
        raise ValueError(f"{path}: the model knows {word.token!r} already; give it another token")


def text_encoders(pipeline: Pipeline) -> Sequence[nn.Module]:
    """The encoders whose embeddings a word needs."""
    own = getattr(pipeline.conditioner, "encoders", None)
    if own is None and isinstance(pipeline.network, TextToImage):
        return (pipeline.network.text,)
    return own or ()


def known_words(pipeline: Pipeline) -> tuple[str, ...]:
    """The words that were added."""
    conditioner = pipeline.conditioner
    holder = conditioner if hasattr(conditioner, "words") else getattr(conditioner, "encode", None)
    words = getattr(holder, "words", ())
    return tuple(word for word, *_ in words)


@dataclass(frozen=True)
class Spliced:
    """The captions' encoding of a run, with words that are put in.

    Attributes:
      encode: captions -> {"tokens" [N, L], "context_mask" [N, L]}.
      words: (word, its first number, their count).
    """

    encode: Callable[[Sequence[str]], dict[str, np.ndarray]]
    words: tuple[tuple[str, int, int], ...]

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """As ``encode``; what is too long is cut before the end."""
        rows = [self._one(caption) for caption in captions]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _one(self, caption: str) -> dict[str, np.ndarray]:
        empty = {name: value[0] for name, value in self.encode([""]).items()}
        length, (begin, end) = len(empty["tokens"]), empty["tokens"][:2]
        inside: list[int] = []
        for piece, word in split(caption, [word for word, *_ in self.words]):
            if word is not None:
                _, first, count = next(known for known in self.words if known[0] == word)
                inside += range(first, first + count)
            elif piece.strip():
                made = self.encode([piece])
                inside += made["tokens"][0][made["context_mask"][0]][1:-1].tolist()
        row = [begin, *inside[: length - 2], end]
        tokens, mask = empty["tokens"].copy(), np.arange(length) < len(row)
        tokens[: len(row)] = row
        return {"tokens": tokens, "context_mask": mask}


@dataclass(frozen=True)
class Inversion:
    """Trains the rows of a new word, and nothing else (an ``Adapter``).

    Attributes:
      token: the word.
      start: for each text encoder, the number of the token that the rows begin as.
      end: for each, that of the token that ends a text.
      count: of rows.
    """

    token: str
    start: tuple[int, ...]
    end: tuple[int, ...]
    count: int

    def network(self, network: nn.Module) -> nn.Module:
        """The network whose text encoders have place for the rows."""
        text = network.text
        if hasattr(text, "encoders"):
            pairs = zip(text.encoders, self.end)
            return network.clone(
                text=text.clone(encoders=tuple(_larger(e, self.count, end) for e, end in pairs))
            )
        return network.clone(text=_larger(text, self.count, self.end[0]))

    def init(self, key: Array, base: Params) -> Params:
        """{"0": (k, d), ...} for each encoder: ``count`` times the row of the first token."""
        del key
        tables = [value for path, value in _tables(base["text"])]
        rows = [jnp.repeat(t[i][None], self.count, 0) for t, i in zip(tables, self.start)]
        return {str(i): row.astype(jnp.float32) for i, row in enumerate(rows)}

    def merge(self, base: Params, params: Params) -> Params:
        """The base's parameters with the rows behind each encoder's own."""
        rows = [params[str(i)] for i in range(len(params))]
        return {**base, "text": _with_rows(base["text"], rows)}

    def conditioner(self, conditioner: Conditioner, network: nn.Module) -> Conditioner:
        """The conditioner that knows the word; ``network`` is that without it."""
        if hasattr(conditioner, "encoders"):
            return conditioner.with_word(self.token, self.count)
        return _own(conditioner, network.text, self.token, self.count)[0]

    def word(self, params: Params) -> Word:
        """What was learned."""
        return Word(self.token, tuple(np.asarray(params[str(i)]) for i in range(len(params))))


def textual_inversion(token: str, init: str, vectors: int = 1, *, base: Pipeline) -> Inversion:
    """Trains a new word of ``vectors`` rows, which begin as the word ``init``.

    Args:
      token: how prompts write it, such as "<cat-toy>".
      init: a word that the text encoders have as one token.
      vectors: number of rows.
      base: the model.

    Raises:
      ValueError: the model takes no prompts, knows the token already, or does not know ``init`` as
        one token.
    """
    check_range("vectors", vectors, 1, 74)
    encoders = text_encoders(base)
    if not encoders:
        raise ValueError("the model has no text encoder that could learn a word")
    if not token.strip() or token != token.strip() or token in known_words(base):
        raise ValueError(f"token={token!r}: expected a word that the model does not know yet")
    rows, ends = [], []
    for i in range(len(encoders)):
        inside, end = _inside(base.conditioner, init, i)
        if len(inside) != 1 or inside[0] == 0:
            what = "unknown to the text encoder" if 0 in inside else f"{len(inside)} tokens"
            raise ValueError(
                f"init={init!r} is {what}; choose a common word, which is one token, such as "
                "'cat' or 'style' for published models"
            )
        rows.append(inside[0])
        ends.append(end)
    return Inversion(token, tuple(rows), tuple(ends), vectors)


def check_prompts(
    own: Inversion,
    base: Pipeline,
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]],
    prompts: Sequence[str],
) -> None:
    """Raises ValueError unless training would see the word, with all of its rows where it stands.

    Args:
      own: what is trained, for the model ``base``.
      encode: prompts -> "tokens" [N, L] or [N, E, L] of the model with the word.
      prompts: those of training.
    """
    times = {p: sum(word is not None for _, word in split(p, [own.token])) for p in prompts}
    holding = [prompt for prompt, count in times.items() if count]
    if not holding:
        raise ValueError(
            f"none of the prompts holds {own.token!r}, so that nothing would be learned; one is "
            f"{next(iter(times), '')!r}"
        )
    first = np.array([encoder.vocab_size for encoder in text_encoders(base)])[:, None]
    tokens = encode(holding)["tokens"]
    rows = (tokens.reshape(len(holding), len(first), -1) >= first).sum(-1).min(-1)
    for prompt, found in zip(holding, rows.tolist()):
        if found < own.count * times[prompt]:
            raise ValueError(
                f"the text encoder's {tokens.shape[-1]} tokens end before the {own.count} rows of "
                f"{own.token!r} in {prompt!r}: choose fewer vectors, or shorter prompts"
            )


def _inside(conditioner: Any, text: str, i: int) -> tuple[list[int], int]:
    """The numbers of a text's tokens for an encoder, and of the end."""
    if hasattr(conditioner, "encoders"):
        tokenizer = conditioner.tokenizers[i]
        return tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id
    row = conditioner.encode([text])
    used = row["tokens"][0][row["context_mask"][0]].tolist()
    return used[1:-1], used[-1]


def _own(
    conditioner: Captions, text: nn.Module, token: str, count: int
) -> tuple[Captions, nn.Module]:
    """Captions that know a word, and the text encoder with place for its rows."""
    first, old = text.vocab_size, conditioner.encode
    words = (*getattr(old, "words", ()), (token, first, count))
    encode = Spliced(getattr(old, "encode", old) if hasattr(old, "words") else old, words)
    end = int(old([""])["tokens"][0][1])
    return replace(conditioner, encode=encode), _larger(text, count, end)


def _larger(encoder: nn.Module, count: int, end: int) -> nn.Module:
    """With more rows. The end is named: it is no longer the largest number of a text's tokens."""
    return encoder.clone(vocab_size=encoder.vocab_size + count, end=end)


def _tables(text: Params) -> list[tuple[str, Any]]:
    flat = flatten_dict(text, sep="/")
    return [(path, value) for path, value in sorted(flat.items()) if path.endswith(TABLE)]


def _with_rows(text: Params, rows: Sequence[Any]) -> Params:
    flat = flatten_dict(text, sep="/")
    for (path, table), own in zip(_tables(text), rows):
        flat[path] = jnp.concatenate([table, jnp.asarray(own, table.dtype)])
    return unflatten_dict(flat, sep="/")
