"""Whether samples are training examples, or nearly so: distances to the nearest, and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from diffusion.errors import check_range
from diffusion.evaluation import figures
from diffusion.evaluation.intervals import Z95, of_share
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.neighbours import nearest
from diffusion.evaluation.networks.network import PIXELS, Network

PICTURE = "memorisation.png"
SUSPICIOUS = 0.01


def memorisation(
    samples: np.ndarray, held_out: np.ndarray, train: np.ndarray, *, seed: int = 0
) -> dict[str, float]:
    """Distances from the nearest training example, of samples beside those of held-out examples.

    Args:
      samples, held_out, train: features [N, D], [H, D] and [M, D].
      seed: of the bootstrap.

    Returns:
      nearest_train: the samples' median distance; nearest_train_real: the held-out examples'.
      nearest_ratio: the first divided by the second, with the half width nearest_ratio_ci of its
        95 % interval. Far below 1, it hints at memorised examples.
      closer: the share of samples that are as close to a training example as only 1 % of the
        held-out ones are, with closer_ci. closer_real is that share of the held-out ones, which
        is 1 / H for H < 200, and larger where distances are equal.
      authentic: the share of samples that are farther from their nearest training example than
        that is from its own nearest one (Alaa et al., 2022); authentic_real: of held-out examples.
      copying_z: the Mann-Whitney statistic of the two sets of distances in standard deviations
        (C_T of Meehan et al., 2020, for the whole space as one cell); below -3: samples are closer
        to the training examples than held-out ones are.
    """
    if len(train) < 2:
        raise ValueError(f"memorisation needs two training examples, got {len(train)}")
    ours, which = nearest(samples, train)
    theirs, near = nearest(held_out, train)
    ours, which, theirs, near = ours[:, 0], which[:, 0], theirs[:, 0], near[:, 0]
    if np.median(theirs) == 0:
        raise ValueError("most of the held-out examples are contained in the training data")
    found = np.unique(np.concatenate([which, near]))
    own = np.zeros(len(train))
    own[found] = nearest(train[found], train, 2)[0][:, 1]  # the first is the example itself
    median, real = float(np.median(ours)), float(np.median(theirs))
    limit = np.quantile(theirs, SUSPICIOUS, method="lower")
    closer, others = ours <= limit, theirs <= limit
    return {
        "nearest_train": median,
        "nearest_train_real": real,
        "nearest_ratio": median / real,
        "nearest_ratio_ci": _ratio_error(ours, theirs, seed) * Z95,
        "closer": float(closer.mean()),
        # The limit scatters as the held-out ones below it do.
        "closer_ci": float(np.hypot(of_share(closer), of_share(others))),
        "closer_real": float(others.mean()),
        "authentic": float((ours > own[which]).mean()),
        "authentic_real": float((theirs > own[near]).mean()),
        "copying_z": _mann_whitney(ours, theirs),
    }


def _mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """(U - n m / 2) / s: U pairs of which a is larger, equal ones by half; s^2 its variance.

    s^2 = n m / 12 (N + 1 - sum (t^3 - t) / (N (N - 1))), of N = n + m values with ties of t.
    """
    n, m = len(a), len(b)
    both = np.concatenate([a, b])
    above = rankdata(both)[:n].sum() - n * (n + 1) / 2 - n * m / 2
    ties = np.unique(both, return_counts=True)[1].astype(float)
    variance = n * m / 12 * (n + m + 1 - (ties**3 - ties).sum() / ((n + m) * (n + m - 1)))
    return float(above / np.sqrt(variance)) if variance > 0 else 0.0


def _ratio_error(a: np.ndarray, b: np.ndarray, seed: int, draws: int = 200) -> float:
    """Standard error of median(a) / median(b) by the bootstrap."""
    rng = np.random.default_rng(seed)
    a, b = (np.median(rng.choice(x, (draws, len(x))), axis=1) for x in (a, b))
    return float((a / np.maximum(b, np.finfo(float).tiny)).std(ddof=1))


def metric(features: Network = PIXELS, pictures: int = 10) -> Metric:
    """``memorisation``, in pixels or in the features of a network.

    Leaves memorisation.png: the ``pictures`` samples that are closest to a training example, above
    that example and above the nearest held-out one.
    """
    check_range("pictures", pictures, 0, 100)

    def measure(judged: Judged) -> dict[str, Any]:
        samples, held_out, train = judged.samples, judged.real("test"), judged.real("train")
        ours, known, other = samples.array(), train.array(), held_out.array()
        result = memorisation(ours, other[: len(ours)], known)
        if judged.folder and pictures and samples.examples and len(samples.shape) == 3:
            distance, index = nearest(ours, known)
            first = np.argsort(distance[:, 0], kind="stable")[:pictures]
            beside = nearest(ours[first], other)[1][:, 0]
            rows = [samples.examples(first), train.examples(index[first, 0])]
            rows = np.concatenate([*rows, held_out.examples(beside)])
            rows = rows if rows.shape[-1] in (1, 3) else rows[..., :3]
            names = ["sample", "nearest training example", "nearest held-out example"]
            grid = figures.image_grid(rows, len(first), row_names=names)
            figures.save_png(judged.folder / PICTURE, grid)
        return {judged.name(name): figure for name, figure in result.items()}

    references = ("test", "train")
    return Metric(measure, network=features, references=references, pictures=pictures > 0)
