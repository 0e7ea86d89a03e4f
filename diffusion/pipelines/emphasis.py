"""Weighted prompts: the syntax of AUTOMATIC1111's web UI, and what the weights do.

a (red:1.3) house, ((old)), [blurry], a smile \\(small\\)
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from diffusion.levels import Array

FACTOR = 1.1
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


def weigh(states: Array, weights: Array, counted: Array) -> jax.Array:
    """Tokens' embeddings [B, L, D], as the encoder gives them, times their weights [B, L].

    The mean over all channels of a prompt's tokens is then restored, as in diffusers' community
    pipeline ``lpw_stable_diffusion`` (the web UI does so for each 77 tokens of a batch together).
    Where all weights are 1 the result is ``states``, exactly.

    Args:
      states: [B, L, D].
      weights: [B, L].
      counted: [B, L] bool, the tokens over which the mean is taken.
    """
    x = states.astype(jnp.float32)
    weighted = x * weights[..., None]

    def total(a: Array) -> jax.Array:
        return jnp.sum(a, (1, 2), keepdims=True, where=counted[..., None])

    plain = jnp.all(weights == 1, axis=1)[:, None, None]
    restored = weighted * (total(x) / total(weighted))
    return jnp.where(plain, states, restored.astype(states.dtype))
