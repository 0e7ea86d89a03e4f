"""Whether pictures are nearest to the real pictures of their own captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.networks.network import Network, pixels

PIXELS = pixels()


def retrieval(
    drawn: np.ndarray, prompts: Sequence[str], real: np.ndarray, captions: Sequence[str]
) -> dict[str, Any]:
    """The rank of each drawn picture's caption among all, by distance to their real pictures.

    Args:
      drawn: pictures [N, ...].
      prompts: the N captions that they were drawn for, each one of ``captions``.
      real: real pictures [M, ...].
      captions: the M captions of the real pictures; they may repeat.

    Returns:
      JSON-ready: first and among_10, the shares of pictures whose own caption is the nearest and
      among the ten nearest; the same by chance; mean_rank in 0..1 (0 is the nearest, by chance
      0.5) and its standard error; number of captions and of pictures.
    """
    names = list(dict.fromkeys(captions))
    row = {name: i for i, name in enumerate(names)}
    a, b = (np.asarray(x.reshape(len(x), -1), np.float64) for x in (drawn, real))
    distance = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T  # [N, M]
    nearest = np.full((len(drawn), len(names)), np.inf)
    for column, caption in enumerate(captions):
        nearest[:, row[caption]] = np.minimum(nearest[:, row[caption]], distance[:, column])
    own = nearest[np.arange(len(drawn)), [row[caption] for caption in prompts]]
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
