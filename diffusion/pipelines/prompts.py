"""Prompts to conditioning: tokens, CLIP's text encoders, and which of their outputs are used.

Stable Diffusion 1 and 2 take the normed output of their encoder. SDXL takes the penultimate
layers' outputs of its two, side by side, and the second one's projection as the pooled embedding;
its refiner has the second encoder alone. An encoder with a projection therefore is SDXL's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.clip import ClipText
from diffusion.pipelines.conditioners import Conditioner
from diffusion.pipelines.emphasis import parse, weigh

Texts = str | Sequence[str]


@dataclass(frozen=True)
class Prompts(Conditioner):
    """The conditioner of Stable Diffusion and SDXL: ``context``, and for SDXL ``pooled``.

    Attributes:
      encoders: of text, in the order of the published pipelines; their parameters are the list
        ``params["encoders"]``.
      tokenizers: one for each.
      zeros: whether an SDXL's absent negative is zeros instead of the empty text.
    """

    encoders: tuple[ClipText, ...]
    tokenizers: tuple[Any, ...]
    zeros: bool = True
    subject: str = "text"
    null: bool = True

    @property
    def sdxl(self) -> bool:
        """Whether contexts are SDXL's."""
        return self.encoders[-1].projection is not None

    def check(self, subject: str | int) -> None:
        """Raises ValueError unless it is a text that says something."""
        if not isinstance(subject, str):
            raise ValueError(f"the model takes prompts, which are texts, got {subject!r}")

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
        max_chunks: int | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """What guidance steers towards, and what away from, each of len(subjects).

        Texts that are too long for an encoder (77 tokens, two of them for start and end) are split
        into chunks of 75, which are encoded on their own, each between start and end, and follow
        each other in the context. A prompt and its negative get equally many by empty chunks. Where
        other prompts of the batch have more, ``context_mask`` leaves the rest out, so that no
        picture depends on what else is in its batch. The pooled embedding is the first chunk's.

        Args:
          params: the pipeline's.
          subjects: the prompts.
          negative: one for all prompts, or one for each. None is the empty text, or zeros for an
            SDXL whose ``zeros`` says so.
          second, second_negative: other texts for SDXL's second encoder.
          clip_skip: how many of the last layers to leave out, beyond those that the model leaves
            out anyway; of the negative's none are, as in diffusers.
          weighted: whether brackets are weights (``emphasis.parse``).
          max_chunks: at most so many; what is beyond is cut off, with a warning. diffusers has 1.

        Raises:
          ValueError: there are no prompts, their numbers differ, or an option is wrong.
        """
        for encoder in self.encoders:
            most = encoder.depth - (2 if self.sdxl else 1)
            if not 0 <= clip_skip <= most:
                raise ValueError(f"clip_skip={clip_skip}; expected 0 to {most} of {encoder.depth}")
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
        # [encoder][prompts or negatives][text]
        chunked = [
            [
                [_chunks(tokenizer, encoder, t, weighted, max_chunks) for t in texts]
                for texts in pair
            ]
            for encoder, tokenizer, pair in zip(self.encoders, self.tokenizers, both)
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
                context, pooled = _encode(encoder, weights, chunks, used, self.sdxl, skipped)
                contexts.append(context)
            return Conditioning(context=jnp.concatenate(contexts, -1), pooled=pooled)

        cond = encode(0, clip_skip)
        null = jax.tree.map(jnp.zeros_like, cond) if zeros else encode(1, 0)
        if not used.all():
            mask = jnp.asarray(np.repeat(used, cond.context.shape[1] // len(used[0]), axis=1))
            cond, null = cond.replace(context_mask=mask), null.replace(context_mask=mask)
        return cond, null


class _Chunks(NamedTuple):
    """Tokens [N, L] and their weights; with the batch in front where texts are stacked."""

    ids: np.ndarray
    weights: np.ndarray


def _filled(chunks: _Chunks, empty: _Chunks, count: int) -> _Chunks:
    """With empty ones behind, ``count`` in all."""
    repeated = [np.repeat(a, count - len(chunks.ids), axis=0) for a in empty]
    return _Chunks(*map(np.concatenate, zip(chunks, repeated)))


def _stack(texts: Sequence[_Chunks]) -> _Chunks:
    return _Chunks(*map(np.stack, zip(*texts)))


@partial(jax.jit, static_argnames=("encoder", "sdxl", "skip"))
def _encode(
    encoder: ClipText, params: Any, chunks: _Chunks, used: Array, sdxl: bool, skip: int
) -> tuple[jax.Array, jax.Array | None]:
    """(context [B, N L, D], pooled [B, P] or None) of chunks [B, N, L].

    ``used`` [B, N] tells a text's chunks from those that fill up the batch; ``skip`` counts the
    layers that are left out.
    """
    b, n, length = chunks.ids.shape
    variables = {"params": params}
    out = encoder.apply(variables, chunks.ids.reshape(b * n, length))
    states = out.hidden[-1 - skip]
    if not sdxl:
        states = encoder.apply(variables, states, method="norm")
    context = weigh(
        states.reshape(b, n * length, -1),
        chunks.weights.reshape(b, n * length),
        jnp.repeat(used, length, axis=1),
    )
    if out.projected is None:
        return context, None
    return context, out.projected.reshape(b, n, -1)[:, 0]


def _chunks(
    tokenizer: Any, encoder: ClipText, text: str, weighted: bool, most: int | None
) -> _Chunks:
    """Of a text, each as long as the encoder's texts are."""
    length = min(tokenizer.model_max_length, encoder.length)
    ids: list[int] = []
    weights: list[float] = []
    for part, weight in parse(text) if weighted else [(text, 1.0)]:
        new = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        ids += new
        weights += [weight] * len(new)
    if ids and max(ids) >= encoder.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {max(ids)}, the text encoder has {encoder.vocab_size} tokens: "
            "they do not belong together"
        )
    inside = length - 2
    if most is not None and len(ids) > most * inside:
        cut = tokenizer.decode(ids[most * inside :])
        warnings.warn(
            f"a prompt of {len(ids)} tokens was cut off after {most * inside}; left out: {cut!r}",
            stacklevel=3,
        )
        ids, weights = ids[: most * inside], weights[: most * inside]
    rows: list[list[int]] = []
    scales: list[list[float]] = []
    for start in range(0, max(len(ids), 1), inside):
        some = ids[start : start + inside]
        padding = inside - len(some)
        ends = [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding
        rows.append([tokenizer.bos_token_id, *some, *ends])
        scales.append([1.0, *weights[start : start + inside], *[1.0] * len(ends)])
    return _Chunks(np.array(rows, np.int32), np.array(scales, np.float32))


def _for_each(prompts: list[str], texts: Texts, name: str) -> list[str]:
    if isinstance(texts, str):
        return [texts] * len(prompts)
    if len(texts) != len(prompts):
        raise ValueError(f"{name}: {len(texts)} texts for {len(prompts)} prompts; expected as many")
    return list(texts)
