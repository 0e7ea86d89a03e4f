"""Inception score (Salimans et al., 2016): how sure classes are, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import log_softmax, xlogy

from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.networks.network import Network

CHUNK = 5000  # ADM's
SPLITS, SEED = 10, 2020  # torch-fidelity's


def inception_scores(logits: Iterable[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """exp(mean_i KL(p_i || mean_i p_i)) of each group of examples, at least 1.

    Args:
      logits: chunks [b, classes], N examples together; p is their softmax, in float64.
      groups: of each example [N], from 0 to G - 1, none empty.

    Returns:
      [G]. Chunks do not change it.
    """
    total, negative, start = 0.0, np.zeros(groups.max() + 1), 0
    for chunk in logits:
        log_p = log_softmax(np.asarray(chunk, np.float64), axis=1)
        p, own = np.exp(log_p), groups[start : start + len(chunk)]
        member = (own == np.arange(len(negative))[:, None]).astype(np.float64)
        total = total + member @ p
        negative += member @ (p * log_p).sum(1)
        start += len(chunk)
    count = np.bincount(groups)
    mean = total / count[:, None]
    return np.exp(negative / count - xlogy(mean, mean).sum(1))


def consecutive(count: int) -> np.ndarray:
    """ADM's groups [count]: 5,000 examples each, in order; fewer in the last one."""
    return np.arange(count) // CHUNK


def shuffled(count: int) -> np.ndarray:
    """torch-fidelity's groups [count]: ten of equal size, in the order of its random permutation.

    Raises:
      ValueError: there are fewer than ten examples.
    """
    if count < SPLITS:
        raise ValueError(f"the inception score needs {SPLITS} samples at least, got {count}")
    groups = np.empty(count, np.int64)
    ends = np.arange(1, SPLITS + 1) * count // SPLITS
    order = np.random.RandomState(SEED).permutation(count)
    groups[order] = np.searchsorted(ends, np.arange(count), side="right")
    return groups


def metric(features: Network | None = None) -> Metric:
    """Inception score of the network's classes.

    Figures: is_NETWORK as ADM computes it, is_NETWORK_split and is_NETWORK_split_std as
    torch-fidelity does. It grows with the number of examples in a group.
    """

    def measure(judged: Judged) -> dict[str, Any]:
        samples, name = judged.samples, judged.name("is")
        plain = inception_scores(samples.chunks("logits"), consecutive(samples.count))
        split = inception_scores(samples.chunks("logits"), shuffled(samples.count))
        figures: dict[str, Any] = {name: float(plain.mean())}
        figures |= {f"{name}_split": float(split.mean()), f"{name}_split_std": float(split.std())}
        if samples.count % CHUNK:
            figures[f"{name}_note"] = (
                f"{name} is a mean over groups of {CHUNK:,} samples; {samples.count:,} do not fill "
                "them, which makes it lower"
            )
        return figures

    return Metric(measure, outputs=("logits",), network=features)
