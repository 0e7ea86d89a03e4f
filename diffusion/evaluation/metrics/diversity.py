"""How much pictures of one subject differ, by LPIPS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.intervals import of_mean
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.networks.lpips import distance
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import Set


def pairs(subjects: Sequence[Any], count: int, most: int, seed: int) -> np.ndarray:
    """Disjoint pairs [P, 2] of indices below ``count`` with the same subject, P at most ``most``.

    They are drawn at random. No example is in two pairs, so that distances are independent. Where
    no subjects are known, all examples have the same.
    """
    groups: dict[Any, list[int]] = {}
    for i in range(count):
        groups.setdefault(subjects[i] if subjects else None, []).append(i)
    rng, found = np.random.default_rng(seed), []
    for group in groups.values():
        order = rng.permutation(group)
        found += list(zip(order[0::2], order[1::2], strict=False))
    found = np.array(found, int).reshape(-1, 2)
    return found[rng.permutation(len(found))[:most]]


def metric(features: Network, most: int = 1000, seed: int = 0, reference: str = "") -> Metric:
    """The mean LPIPS of random pairs of samples of the same subject.

    diversity_lpips and its interval, diversity_lpips_real of pairs of real examples, and the
    numbers of pairs. Below the real figure, samples of a subject repeat themselves; noise and
    damage raise it, so read it beside a distance to the data.

    Args:
      features: ``lpips("FILE")``.
      most: largest number of pairs; the first 2 most samples are compared.
      seed: of the pairs.
      reference: the real examples.
    """
    check_range("most", most, 1, 1_000_000)
    check_range("seed", seed, 0)
    if features.outputs != ("pictures",):
        raise ValueError(f'diversity needs lpips("FILE"), got the network {features.name}')

    def distances(examples: Set) -> np.ndarray:
        x = examples.array("pictures", 2 * most)
        index = pairs(examples.subjects, len(x), most, seed)
        if not len(index):
            raise ValueError(f"no two of the {len(x)} examples of {examples.name} have one subject")
        return distance(features)(x[index[:, 0]], x[index[:, 1]])

    def measure(judged: Judged) -> dict[str, Any]:
        own, real = distances(judged.samples), distances(judged.real(reference))
        return {
            judged.name("diversity"): float(own.mean()),
            judged.name("diversity_ci"): of_mean(own),
            judged.name("diversity_pairs"): len(own),
            judged.name("diversity_real"): float(real.mean()),
            judged.name("diversity_real_ci"): of_mean(real),
            judged.name("diversity_pairs_real"): len(real),
        }

    return Metric(measure, ("pictures",), features, 2 * most, references=(reference,))
