"""Share of class-conditional samples that an independent classifier takes for their class."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.evaluation.classifiers import Classifier


def recognition(samples: np.ndarray, labels: np.ndarray, classifier: Classifier) -> dict[str, Any]:
    """Recognition of samples [N, H, W, C] in [-1, 1], drawn for the classes ``labels`` [N].

    Returns:
      recognised, over all samples; recognised_per_class; and, for comparison, the classifier's name
      and its accuracy on how many held-out real examples.
    """
    hit = classifier.predict(samples) == labels
    return {
        "recognised": float(hit.mean()),
        "recognised_per_class": {str(c): float(hit[labels == c].mean()) for c in np.unique(labels)},
        "classifier": classifier.name,
        "classifier_accuracy": classifier.accuracy,
        "classifier_num_held_out": classifier.num_held_out,
    }
