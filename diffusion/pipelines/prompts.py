"""Prompts to conditioning: tokens, CLIP's text encoders, and which of their outputs are used.

Stable Diffusion 1 and 2 take the normed output of their encoder. SDXL takes the penultimate
layers' outputs of its two, side by side, and the second one's projection as the pooled embedding;
its refiner has the second encoder alone. An encoder with a projection therefore is SDXL's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.clip import ClipText
from diffusion.pipelines.conditioners import Conditioner
from diffusion.pipelines.emphasis import BREAK, RESTORE, check, parse, weigh
from diffusion.specs import unknown

Texts = str | Sequence[str]
Words = Mapping[str, Sequence[int]]
"""New words, and the tokens that an encoder has for each."""


@dataclass(frozen=True)
class Prompts(Conditioner):
    """The conditioner of Stable Diffusion and SDXL: ``context``, and for SDXL ``pooled``.

    Attributes:
      encoders: of text, in the order of the published pipelines; their parameters are the list
        ``params["encoders"]``.
      tokenizers: one for each.
      zeros: whether an SDXL's absent negative is zeros instead of the empty text.
      suggestions: prompts to draw where none are given.
      words: new ones, each with the number of its first row in each encoder, and their count.
    """

    encoders: tuple[ClipText, ...]
    tokenizers: tuple[Any, ...]
    zeros: bool = True
    suggestions: tuple[str, ...] = ()
    words: tuple[tuple[str, tuple[int, ...], int], ...] = ()
    subject: str = "text"
    null: bool = True

    @property
    def sdxl(self) -> bool:
        """Whether contexts are SDXL's."""
        return self.encoders[-1].projection is not None

    def with_word(self, token: str, count: int) -> Prompts:
        """The conditioner of encoders that have ``count`` more rows, which ``token`` stands for."""
        pairs = zip(self.encoders, self.tokenizers)
        firsts = tuple(encoder.vocab_size for encoder in self.encoders)
        # The end is named: it is no longer the largest number of a text's tokens.
        larger = (e.clone(vocab_size=e.vocab_size + count, end=t.eos_token_id) for e, t in pairs)
        return replace(self, encoders=tuple(larger), words=(*self.words, (token, firsts, count)))

    def own_words(self, i: int) -> Words:
        """The new words as encoder ``i`` numbers them: {word: its tokens}."""
        return {word: range(firsts[i], firsts[i] + count) for word, firsts, count in self.words}

    def check(self, subject: str | int) -> None:
        """Raises ValueError unless it is a text that says something."""
        if not isinstance(subject, str):
            raise ValueError(f"the model takes prompts, which are texts, got {subject!r}")
        check(subject)

    def __call__(
        self,
        params: Mapping[str, Any],
        subjects: Texts,
        negative: Texts | None = None,
        *,
        second: Texts | None = None,
        second_negative: Texts | None = None,
        clip_skip: int = 0,
        weighted: bool = False,
        emphasis: str = "auto",
        max_chunks: int | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """What guidance steers towards, and what away from, each of len(subjects).

        Texts that are too long for an encoder (77 tokens, two of them for start and end) are split
        into chunks of 75, which are encoded on their own, each between start and end, and follow
        each other in the context. A prompt and its negative get equally many by empty chunks. Where
        other prompts of the batch have more, ``context_mask`` leaves the rest out, so that no
        picture depends on what else is in its batch. BREAK in a text begins a chunk. The pooled
        embedding is the first chunk's.

        Args:
          params: the pipeline's.
          subjects: the prompts.
          negative: one for all prompts, or one for each. None is the empty text, or zeros for an
            SDXL whose ``zeros`` says so.
          second, second_negative: other texts for SDXL's second encoder.
          clip_skip: how many of the last layers to leave out, beyond those that the model leaves
            out anyway; of the negative's none are, as in diffusers.
          weighted: whether brackets are weights (``emphasis.parse``).
          emphasis: what the weights leave as it was: none, mean or norm (``emphasis.weigh``); auto
            is the norm for SDXL, else the mean.
          max_chunks: at most so many; what is beyond is cut off, with a warning. diffusers has 1.

        Raises:
          ValueError: there are no prompts, their numbers differ, or an option is wrong.
        """
        for encoder in self.encoders:
            most = encoder.depth - (2 if self.sdxl else 1)
            if not 0 <= clip_skip <= most:
                raise ValueError(f"clip_skip={clip_skip}; expected 0 to {most} of {encoder.depth}")
        if emphasis not in ("auto", *RESTORE):
            raise unknown("emphasis", emphasis, ("auto", *RESTORE))
        if emphasis == "auto":
            emphasis = "norm" if self.sdxl else "mean"
        if max_chunks is not None and max_chunks < 1:
            raise ValueError(f"max_chunks={max_chunks}; expected at least 1")
        prompts = [subjects] if isinstance(subjects, str) else list(subjects)
        if not prompts:
            raise ValueError("no prompts; expected at least one")
        zeros = self.sdxl and negative is None and self.zeros
        both = [
            (prompts, _for_each(prompts, "" if negative is None else negative, "negative")),
            (
                _for_each(prompts, prompts if second is None else second, "second"),
                _for_each(prompts, second_negative or negative or "", "second_negative"),
            ),
        ]
        for text in dict.fromkeys(text for pair in both for texts in pair for text in texts):
            self.check(text)
        known = [self.own_words(i) for i in range(len(self.encoders))]
        # [encoder][prompts or negatives][text]
        chunked = [
            [
                [_chunks(tokenizer, encoder, t, weighted, max_chunks, words) for t in texts]
                for texts in pair
            ]
            for encoder, tokenizer, pair, words in zip(self.encoders, self.tokenizers, both, known)
        ]
        needed = np.array([[[len(c.ids) for c in texts] for texts in pair] for pair in chunked])
        counts = needed[:, :1].max((0, 1)) if zeros else needed.max((0, 1))
        used = np.arange(counts.max()) < counts[:, None]

        def encode(side: int, skip: int) -> Conditioning:
            contexts, pooled = [], None
            for i, (encoder, tokenizer) in enumerate(zip(self.encoders, self.tokenizers)):
                empty = _chunks(tokenizer, encoder, "", False, None)
                chunks = _stack([_filled(c, empty, len(used[0])) for c in chunked[i][side]])
                weights = params["encoders"][i]
                skipped = skip + self.sdxl
                context, pooled = _encode(encoder, weights, chunks.ids, self.sdxl, skipped)
                scales, length = chunks.weights, chunks.ids.shape[-1]
                counted = np.repeat(used, length, axis=1)
                contexts.append(_weigh(context, scales.reshape(counted.shape), counted, emphasis))
            return Conditioning(context=jnp.concatenate(contexts, -1), pooled=pooled)

        cond = encode(0, clip_skip)
        null = jax.tree.map(jnp.zeros_like, cond) if zeros else encode(1, 0)
        if not used.all():
            mask = jnp.asarray(np.repeat(used, cond.context.shape[1] // len(used[0]), axis=1))
            cond, null = cond.replace(context_mask=mask), null.replace(context_mask=mask)
        return cond, null

    def ids(self, text: str) -> np.ndarray:
        """Tokens [E, L] of a text for each encoder, cut to one chunk, for training."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [
                _chunks(t, e, text, False, 1, self.own_words(i)).ids
                for i, (t, e) in enumerate(zip(self.tokenizers, self.encoders))
            ]
        return np.concatenate(rows)


class _Chunks(NamedTuple):
    """Tokens [N, L] and their weights; with the batch in front where texts are stacked."""

    ids: np.ndarray
    weights: np.ndarray


_weigh = jax.jit(weigh, static_argnames="restore")


def _filled(chunks: _Chunks, empty: _Chunks, count: int) -> _Chunks:
    """With empty ones behind, ``count`` in all."""
    repeated = [np.repeat(a, count - len(chunks.ids), axis=0) for a in empty]
    return _Chunks(*map(np.concatenate, zip(chunks, repeated)))


def _stack(texts: Sequence[_Chunks]) -> _Chunks:
    return _Chunks(*map(np.stack, zip(*texts)))


@partial(jax.jit, static_argnames=("encoder", "sdxl", "skip"))
def _encode(
    encoder: ClipText, params: Any, ids: Array, sdxl: bool, skip: int
) -> tuple[jax.Array, jax.Array | None]:
    """(context [B, N L, D], pooled [B, P] or None) of chunks' tokens [B, N, L]; ``skip`` counts the
    layers that are left out."""
    b, n, length = ids.shape
    variables = {"params": params}
    out = encoder.apply(variables, ids.reshape(b * n, length))
    states = out.hidden[-1 - skip]
    if not sdxl:
        states = encoder.apply(variables, states, method="norm")
    context = states.reshape(b, n * length, -1)
    if out.projected is None:
        return context, None
    return context, out.projected.reshape(b, n, -1)[:, 0]


def _chunks(
    tokenizer: Any,
    encoder: ClipText,
    text: str,
    weighted: bool,
    most: int | None,
    words: Words = MappingProxyType({}),
) -> _Chunks:
    """Of a text, each as long as the encoder's texts are; new words stay whole where they fit."""
    inside = min(tokenizer.model_max_length, encoder.length) - 2
    rows: list[list[tuple[int, float]]] = [[]]  # of (token, weight)
    for part, weight in parse(_escaped(text, words)) if weighted else [(text, 1.0)]:
        for number, piece in enumerate(BREAK.split(part)):
            if number:
                rows.append([])
            for plain, word in split(piece, words):
                ids = (
                    tokenizer(plain, add_special_tokens=False, verbose=False).input_ids
                    if word is None
                    else words[word]
                )
                whole = word is not None and len(ids) <= inside
                for unit in [ids] if whole else [[token] for token in ids]:
                    if len(rows[-1]) + len(unit) > inside:
                        rows.append([])
                    rows[-1] += [(token, weight) for token in unit]
    largest = max((token for row in rows for token, _ in row), default=0)
    if largest >= encoder.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, the text encoder has {encoder.vocab_size} tokens: "
            "they do not belong together"
        )
    if most is not None and len(rows) > most:
        cut = tokenizer.decode([token for row in rows[most:] for token, _ in row])
        count = sum(map(len, rows))
        warnings.warn(
            f"a prompt of {count} tokens was cut off after {sum(map(len, rows[:most]))}; left out: "
            f"{cut!r}",
            stacklevel=3,
        )
        rows = rows[:most]
    begin = (tokenizer.bos_token_id, 1.0)
    ends = [(tokenizer.eos_token_id, 1.0), *[(tokenizer.pad_token_id, 1.0)] * inside]
    filled = np.array([[begin, *row, *ends][: inside + 2] for row in rows])  # [N, L, 2]
    return _Chunks(filled[..., 0].astype(np.int32), filled[..., 1].astype(np.float32))


def _escaped(text: str, words: Iterable[str]) -> str:
    """A text in which the brackets of words, such as "[V]", are no weights."""
    pieces = split(text, words)
    return "".join(re.sub(r"[()\[\]\\]", r"\\\g<0>", p) if word else p for p, word in pieces)


def _for_each(prompts: list[str], texts: Texts, name: str) -> list[str]:
    if isinstance(texts, str):
        return [texts] * len(prompts)
    if len(texts) != len(prompts):
        raise ValueError(f"{name}: {len(texts)} texts for {len(prompts)} prompts; expected as many")
    return list(texts)


def split(text: str, words: Iterable[str]) -> list[tuple[str, str | None]]:
    """A text as pieces (text, None) and (word, word), at the bounds of words, longer ones first."""
    ordered = sorted(words, key=len, reverse=True)
    if not ordered:
        return [(text, None)]
    pattern = "|".join(
        (r"(?<!\w)" if re.match(r"\w", word[0]) else "")
        + re.escape(word)
        + (r"(?!\w)" if re.match(r"\w", word[-1]) else "")
        for word in ordered
    )
    parts = re.split(f"({pattern})", text)
    return [(part, part if i % 2 else None) for i, part in enumerate(parts) if part]
