"""Weighted prompts: the syntax of AUTOMATIC1111's web UI, and what the weights do.

a (red:1.3) house, ((old)), [blurry], a smile \\(small\\)
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from diffusion.levels import Array

FACTOR = 1.1
LARGEST = 10.0
"""Factor that restores a weighted prompt, at most."""
RESTORE = ("none", "mean", "norm")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
"""Where a new chunk of tokens begins."""
_CHANGING = re.compile(r"(?<!\\)\[(?:.*?:\s*\d*\.?\d+\s*|[^\[\]]*\|[^\[\]]*(?<!\\))\]", re.DOTALL)
_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|[^\\()\[\]:]+|[\\:]"
)


def parse(prompt: str) -> list[tuple[str, float]]:
    """The texts that a prompt consists of, in order, with their weights.

    ``(text:1.3)`` has weight 1.3, ``(text)`` 1.1 and ``[text]`` 1/1.1; brackets may be nested, and
    weights then multiply. An opening bracket that is not closed counts up to the end, a closing one
    that was not opened is text. ``\\(``, ``\\)``, ``\\[``, ``\\]`` and ``\\\\`` are the characters.
    Neighbours of equal weight are one text, so that one without weights comes back whole.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        weights[start:] = [w * factor for w in weights[start:]]

    for token in _TOKEN.finditer(prompt):
        bracket, weight = token["bracket"], token["weight"]
        if bracket in opened:
            opened[bracket].append(len(texts))
        elif bracket == "]" and opened["["]:
            scale(opened["["].pop(), 1 / FACTOR)
        elif bracket == ")" and opened["("]:
            scale(opened["("].pop(), FACTOR)
        elif weight is not None and opened["("]:
            scale(opened["("].pop(), float(weight))
        else:
            texts.append(token["escaped"] or token[0])
            weights.append(1.0)
    for kind, factor in (("(", FACTOR), ("[", 1 / FACTOR)):
        for start in opened[kind]:
            scale(start, factor)
    joined: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights):
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def check(prompt: str) -> None:
    """Raises ValueError for the web UI's syntax that has no meaning here."""
    composed = re.search(r"\bAND\b", prompt)
    if composed:
        raise ValueError(
            f"prompt {prompt!r}: AND, of several prompts, is not supported; for the word, write "
            "and (the encoders know no capitals)"
        )
    changing = _CHANGING.search(prompt)
    if changing:
        plain = changing[0].replace("[", r"\[").replace("]", r"\]")
        raise ValueError(
            f"prompt {prompt!r}: {changing[0]}, a text that changes while sampling, is not "
            f"supported; for the characters, write {plain} with weighted=True (samples.weighted)"
        )


def weigh(states: Array, weights: Array, counted: Array, restore: str = "mean") -> jax.Array:
    """Tokens' embeddings [B, L, D], as the encoder gives them, times their weights w [B, L].

    A prompt's embeddings are then scaled by one factor c, that of ``restore``:

    - "none": c = 1;
    - "mean": c = sum x / sum w x over all channels of its tokens, as in diffusers' community
      pipeline ``lpw_stable_diffusion`` (the web UI does so for each 77 tokens of a batch together);
    - "norm": c = |x| / |w x|, which SDXL needs, whose embeddings have a mean near 0.

    The last lies between 1 / max |w| and 1 / min |w|, at most ``LARGEST``. So does the mean's where
    embeddings have mostly one sign; where it leaves that range by more than a factor of 2 (its sums
    cancel), the norm's c takes its place. Where all weights are 1 the result is ``states``.

    Args:
      states: [B, L, D].
      weights: [B, L].
      counted: [B, L] bool, the tokens over which the sums are taken.
      restore: of ``RESTORE``.
    """
    x = states.astype(jnp.float32)
    weighted, size = x * weights[..., None], jnp.abs(weights)
    low = 1 / jnp.maximum(jnp.max(size, 1, where=counted, initial=0), 1 / LARGEST)
    high = 1 / jnp.maximum(jnp.min(size, 1, where=counted, initial=LARGEST), 1 / LARGEST)

    def total(a: Array) -> jax.Array:
        return jnp.sum(a, (1, 2), where=counted[..., None])

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b == 0, jnp.inf, a / jnp.where(b == 0, 1, b))

    c = jnp.clip(jnp.sqrt(ratio(total(x**2), total(weighted**2))), low, high)
    if restore == "mean":
        mean = ratio(total(x), total(weighted))
        c = jnp.where((low / 2 <= mean) & (mean <= 2 * high), mean, c)
    restored = weighted if restore == "none" else weighted * c[:, None, None]
    plain = jnp.all(weights == 1, axis=1)[:, None, None]
    return jnp.where(plain, states, restored.astype(states.dtype))
