"""Share of class-conditional samples that an independent classifier takes for their class."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.evaluation import classifiers
from diffusion.evaluation.classifiers import Classifier
from diffusion.evaluation.metrics.metric import Data, Draw, Metric, checked


def recognition(samples: np.ndarray, labels: np.ndarray, classifier: Classifier) -> dict[str, Any]:
    """Recognition of samples [N, H, W, C] in [-1, 1], drawn for the classes ``labels`` [N].

    recognised is over all samples; recognised_real is the classifier's accuracy on
    recognised_real_count held-out real examples.
    """
    hit = classifier.predict(samples) == labels
    return {
        "recognised": float(hit.mean()),
        "recognised_per_class": {str(c): float(hit[labels == c].mean()) for c in np.unique(labels)},
        "classifier": classifier.name,
        "recognised_real": classifier.accuracy,
        "recognised_real_count": classifier.num_held_out,
    }


def metric(classifier: str, weights: str = "") -> Metric:
    """``recognition`` by one of ``classifiers.CHOICES``; ``weights`` is its file, if any."""
    judge = classifiers.make(classifier, weights)

    def measure(pipeline: Any, params: Any, data: Data, draw: Draw) -> dict[str, Any]:
        drawn, fitted = draw(), judge(data.held_out)
        x = checked(drawn, data).clip(-1, 1)
        return recognition(x, np.asarray(drawn.subjects), fitted)

    return measure
