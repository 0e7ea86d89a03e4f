"""Metrics: one file each, named after what it measures.

A metric is a ``metric.Metric``: what it needs of the samples, and a function that takes figures
from it. All metrics share one pass over the samples and the features of real examples, see
``harness``.
Figures are what JSON can hold; a figure of real data that stands beside another has its name with
``_real``, half the width of its 95 % interval with ``_ci``. ``metric`` in each file makes one from
its options, which it checks; its name in ``CHOICES`` is what a config calls it.
"""

from diffusion.evaluation.metrics import (
    bits,
    caption_gap,
    energy,
    frechet,
    memorisation,
    per_class,
    recognition,
    retrieval,
    wasserstein,
)

CHOICES = {
    "bits": bits.metric,
    "caption_gap": caption_gap.metric,
    "energy": energy.metric,
    "frechet": frechet.metric,
    "memorisation": memorisation.metric,
    "per_class": per_class.metric,
    "recognition": recognition.metric,
    "retrieval": retrieval.metric,
    "wasserstein": wasserstein.metric,
}
