"""Whether a text-to-image model follows its captions: held-out losses and retrieval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.sources import Batch, Source
from diffusion.objectives.objective import Context

Z95 = 1.959964  # half the width of a 95 % interval, in standard errors


def caption_gap(
    objective: Any,
    params: Any,
    source: Source,
    *,
    draws: int = 8,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """The loss with each example's caption, with another example's and with the empty one.

    All three see the same noise and times. If the model did not use the text, the first two would
    be equal; the share of examples whose own caption has the smaller loss would be a half.

    Args:
      objective: a ``Denoising``.
      params: its parameters.
      source: captioned examples, held out; every one is used.
      draws: noise levels per example, which its losses are means over.
      batch_size: examples at once.
      seed: of the noise, and of which caption goes to which other example.

    Returns:
      JSON-ready: loss, loss_other and loss_empty; gap = loss_other - loss with the half width
      gap_ci of its 95 % interval over examples; gap_empty and gap_empty_ci likewise; own_preferred,
      the share of examples, and its standard error; count and draws.
    """
    rng = np.random.default_rng(seed)
    other = _others(source.captions, rng)
    objective = dataclasses.replace(objective, stratify=None, dropout=0.0)

    @jax.jit
    def losses(params: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        def one(example: Batch, key: jax.Array) -> jax.Array:
            example = jax.tree.map(lambda leaf: leaf[None], example)
            return objective.loss(params, Context(train=False), example, key)[0]

        return jax.vmap(one)(batch, keys)

    def mean_losses(captions: Sequence[str]) -> np.ndarray:
        total = []
        for start in range(0, len(source), batch_size):
            index = np.minimum(np.arange(start, start + batch_size), len(source) - 1)
            batch = source.read(index) | source.encode([captions[i] for i in index])
            batch["index"] = index.astype(np.int32)
            batch.pop("x_std", None)
            key = jax.random.key(seed)
            draw = [
                losses(params, batch, jnp.broadcast_to(jax.random.fold_in(key, d), index.shape))
                for d in range(draws)
            ]
            total.append(np.mean(draw, axis=0)[: len(source) - start])
        return np.concatenate(total)

    own = mean_losses(source.captions)
    wrong = mean_losses([source.captions[i] for i in other])
    empty = mean_losses([""] * len(source))
    gap, gap_ci = _interval(wrong - own)
    gap_empty, gap_empty_ci = _interval(empty - own)
    preferred = float((own < wrong).mean())
    return {
        "loss": float(own.mean()),
        "loss_other": float(wrong.mean()),
        "loss_empty": float(empty.mean()),
        "gap": gap,
        "gap_ci": gap_ci,
        "gap_empty": gap_empty,
        "gap_empty_ci": gap_empty_ci,
        "own_preferred": preferred,
        "own_preferred_error": float(np.sqrt(preferred * (1 - preferred) / len(own))),
        "count": len(own),
        "draws": draws,
    }


def retrieval(
    drawn: np.ndarray,
    asked: Sequence[str],
    real: np.ndarray,
    captions: Sequence[str],
    features: Callable[[np.ndarray], np.ndarray] = lambda x: x.reshape(len(x), -1),
) -> dict[str, Any]:
    """Where a drawn picture's own caption ranks among all, by distance to their real pictures.

    Args:
      drawn: [N, ...] pictures of the captions ``asked``, N.
      asked: captions among ``captions``.
      real: [M, ...] real pictures, of ``captions``, M, which may repeat.
      captions: of the real pictures.
      features: what distances are taken of, by default pixels.

    Returns:
      JSON-ready: first and among_10, the shares of pictures whose own caption is the nearest and
      among the ten nearest; the same by chance; mean_rank in 0..1 (0 is the nearest, by chance
      0.5) and its standard error; number of captions and of pictures.
    """
    names = list(dict.fromkeys(captions))
    row = {name: i for i, name in enumerate(names)}
    a, b = (np.asarray(features(x), np.float64) for x in (drawn, real))
    distance = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T  # [N, M]
    nearest = np.full((len(drawn), len(names)), np.inf)
    for column, caption in enumerate(captions):
        nearest[:, row[caption]] = np.minimum(nearest[:, row[caption]], distance[:, column])
    own = nearest[np.arange(len(drawn)), [row[caption] for caption in asked]]
    rank = (nearest < own[:, None]).sum(1)
    relative = rank / max(len(names) - 1, 1)
    return {
        "first": float((rank == 0).mean()),
        "first_by_chance": 1 / len(names),
        "among_10": float((rank < 10).mean()),
        "among_10_by_chance": min(1.0, 10 / len(names)),
        "mean_rank": float(relative.mean()),
        "mean_rank_error": float(relative.std(ddof=1) / np.sqrt(len(rank))),
        "captions": len(names),
        "pictures": len(drawn),
    }


def _others(captions: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """For each example another one, of another caption."""
    numbers = np.unique(np.asarray(captions), return_inverse=True)[1]
    if numbers.max(initial=0) == 0:
        raise ValueError("expected examples of at least two captions")
    other = rng.integers(0, len(numbers), len(numbers))
    while (same := numbers[other] == numbers).any():
        other[same] = rng.integers(0, len(numbers), same.sum())
    return other


def _interval(difference: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean()), float(Z95 * error)
