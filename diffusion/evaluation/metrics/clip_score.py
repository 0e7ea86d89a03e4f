"""How well pictures fit their captions, by a network that embeds both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.intervals import of_mean, of_share
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.networks.network import Network

OUTPUTS = ("features", "text")


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine [N] of the angle between rows of a and b, [N, D], in float64."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    if not lengths.all():
        raise ValueError("an embedding is 0, and has no direction")
    return (a * b).sum(-1) / lengths


def retrieved(
    pictures: np.ndarray,
    texts: np.ndarray,
    captions: Sequence[str],
    *,
    negatives: int = 99,
    seed: int = 0,
) -> np.ndarray:
    """Whether each picture is nearer to its own caption than to random others: [N], 0 to 1.

    Xu et al., 2018, "AttnGAN". A picture whose nearest captions tie counts 1 / (number of them).

    Args:
      pictures, texts: embeddings [N, D] of pictures and of their captions.
      captions: the N captions. Equal ones are one caption, never a negative of itself.
      negatives: other captions for each picture, without repetition.
      seed: of the choice of negatives.

    Raises:
      ValueError: captions are not known, or there are not as many others.
    """
    check_range("negatives", negatives, 1)
    if len(captions) != len(pictures) or None in captions:
        raise ValueError("R-precision needs the caption of each picture, and these have none")
    names, first, own = np.unique(np.asarray(captions), return_index=True, return_inverse=True)
    if len(names) <= negatives:
        raise ValueError(
            f"negatives={negatives} needs as many other captions; there are {len(names)} different "
            f"ones, so at most {len(names) - 1}"
        )
    texts, pictures = (np.asarray(x, np.float64) for x in (texts, pictures))
    texts = texts[first] / np.linalg.norm(texts[first], axis=-1, keepdims=True)
    rng, hits = np.random.default_rng(seed), np.zeros(len(pictures))
    for i, picture in enumerate(pictures):
        others = rng.choice(len(names) - 1, negatives, replace=False)
        others += others >= own[i]
        # Row by row, not by a matrix product, so that equal embeddings tie to the last bit.
        mine, *against = (texts[[own[i], *others]] * picture).sum(-1)
        if mine >= max(against):
            hits[i] = 1 / (1 + against.count(mine))
    return hits


def metric(features: Network | None = None) -> Metric:
    """CLIP score (Hessel et al., 2021): the mean of 100 max(cos, 0) of pictures and captions.

    Named clip_score_NETWORK, with its interval; beside it clip_cosine_NETWORK, the mean of cos
    itself. The network has the outputs "features" and "text" in one space.
    """

    def measure(judged: Judged) -> dict[str, Any]:
        cosine = cosines(*(judged.samples.array(output) for output in OUTPUTS))
        score = 100 * cosine.clip(0)
        return {
            judged.name("clip_score"): float(score.mean()),
            judged.name("clip_score_ci"): of_mean(score),
            judged.name("clip_cosine"): float(cosine.mean()),
            judged.name("clip_cosine_ci"): of_mean(cosine),
        }

    return Metric(measure, OUTPUTS, features)


def r_precision(features: Network | None = None, negatives: int = 99, seed: int = 0) -> Metric:
    """The mean of ``retrieved``, r_precision_NETWORK, in 0..1, with its interval.

    r_precision_chance_NETWORK beside it is what pictures that ignore their captions reach.
    """
    check_range("negatives", negatives, 1)
    check_range("seed", seed, 0)

    def measure(judged: Judged) -> dict[str, Any]:
        samples = judged.samples
        arrays = (samples.array(output) for output in OUTPUTS)
        hits = retrieved(*arrays, samples.subjects, negatives=negatives, seed=seed)
        return {
            judged.name("r_precision"): float(hits.mean()),
            judged.name("r_precision_ci"): of_share(hits),
            judged.name("r_precision_chance"): 1 / (1 + negatives),
        }

    return Metric(measure, OUTPUTS, features)
