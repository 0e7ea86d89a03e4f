"""Share of class-conditional samples that an independent classifier takes for their class."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.evaluation.intervals import of_share
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import Set


def recognition(samples: Set, real: Set) -> dict[str, Any]:
    """How often a classifier's output "label" is the subject of a sample, and of a real example.

    Returns:
      recognised: the share of all samples, with the half width of its 95 % interval;
      recognised_per_class: by class; recognised_real: of recognised_real_count real examples.
    """
    hit, wanted = _hits(samples), np.asarray(samples.subjects)
    return {
        "recognised": float(hit.mean()),
        "recognised_ci": of_share(hit),
        "recognised_per_class": {str(c): float(hit[wanted == c].mean()) for c in np.unique(wanted)},
        "recognised_real": float(_hits(real).mean()),
        "recognised_real_count": real.count,
    }


def _hits(examples: Set) -> np.ndarray:
    subjects = np.asarray(examples.subjects)
    if subjects.shape != (examples.count,) or subjects.dtype.kind not in "iu":
        raise ValueError(f"recognition needs a class of each example; {examples.name} has none")
    return examples.array("label") == subjects


def metric(classifier: Network, reference: str = "") -> Metric:
    """``recognition`` by a network with the output "label"; its accuracy is on ``reference``."""

    def measure(judged: Judged) -> dict[str, Any]:
        result = recognition(judged.samples, judged.real(reference))
        return result | {"classifier": classifier.name}

    return Metric(measure, ("label",), classifier, references=(reference,))
