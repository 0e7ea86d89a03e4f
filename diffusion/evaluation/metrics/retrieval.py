"""Whether pictures are nearest to the real pictures of their own captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.neighbours import ROWS
from diffusion.evaluation.networks.network import PIXELS, Network


def retrieval(
    drawn: np.ndarray, prompts: Sequence[str], real: np.ndarray, captions: Sequence[str]
) -> dict[str, Any]:
    """The rank of each drawn picture's caption among all, by distance to their real pictures.

    Args:
      drawn: pictures [N, ...].
      prompts: the N captions that they were drawn for, each one of ``captions``.
      real: real pictures [M, ...].
      captions: the M captions of the real pictures; they may repeat.

    Captions at the same distance as the own one are in random order: shares and ranks are what is
    expected of it.

    Returns:
      JSON-ready: first and among_10, the shares of pictures whose own caption is the nearest and
      among the ten nearest; the same by chance; mean_rank in 0..1 (0 is the nearest, by chance
      0.5) and its standard error; number of captions and of pictures.
    """
    names = list(dict.fromkeys(captions))
    row = {name: i for i, name in enumerate(names)}
    groups = np.array([row[caption] for caption in captions])
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(len(names)))
    wanted = np.array([row[caption] for caption in prompts])
    # In float64, from a common mean: rounding is 1e-15 of the squares.
    b = np.asarray(real, np.float64).reshape(len(real), -1)
    centre = b.mean(0)
    b = b[order] - centre
    squares = (b**2).sum(1)
    closer, tied = np.empty(len(drawn)), np.empty(len(drawn))
    for i in range(0, len(drawn), ROWS):
        a = np.asarray(drawn[i : i + ROWS], np.float64).reshape(-1, b.shape[1]) - centre
        own = (a**2).sum(1)[:, None]
        distance = np.minimum.reduceat(own + squares - 2 * a @ b.T, starts, axis=1)
        apart = distance - np.take_along_axis(distance, wanted[i : i + ROWS, None], 1)
        same = np.abs(apart) <= 1e-12 * (own + squares.max())
        closer[i : i + ROWS] = ((apart < 0) & ~same).sum(1)
        tied[i : i + ROWS] = same.sum(1) - 1
    rank = closer + tied / 2
    relative = rank / max(len(names) - 1, 1)
    return {
        "first": float(((closer == 0) / (1 + tied)).mean()),
        "first_by_chance": 1 / len(names),
        "among_10": float(((10 - closer) / (1 + tied)).clip(0, 1).mean()),
        "among_10_by_chance": min(1.0, 10 / len(names)),
        "mean_rank": float(relative.mean()),
        "mean_rank_error": float(relative.std(ddof=1) / np.sqrt(len(rank))),
        "captions": len(names),
        "pictures": len(drawn),
    }


def metric(features: Network = PIXELS, reference: str = "") -> Metric:
    """``retrieval`` of samples among the captions of real examples, named ``retrieval_...``."""

    def measure(judged: Judged) -> dict[str, Any]:
        real, samples = judged.real(reference), judged.samples
        if not set(samples.subjects) <= set(real.subjects) or not samples.subjects:
            raise ValueError(
                "retrieval is of captions that the real examples have: leave config.samples.prompt "
                "out"
            )
        found = retrieval(samples.array(), samples.subjects, real.array(), real.subjects)
        return {f"retrieval_{name}": figure for name, figure in found.items()}

    return Metric(measure, network=features, references=(reference,))
