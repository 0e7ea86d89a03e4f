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
    caption_similarity,
    clip_score,
    cmmd,
    density_coverage,
    diversity,
    energy,
    frame_consistency,
    frechet,
    inception_score,
    kid,
    memorisation,
    per_class,
    precision_recall,
    recognition,
    retrieval,
    wasserstein,
)

CHOICES = {
    "bits": bits.metric,
    "caption_gap": caption_gap.metric,
    "caption_similarity": caption_similarity.metric,
    "clip_score": clip_score.metric,
    "cmmd": cmmd.metric,
    "density_coverage": density_coverage.metric,
    "diversity": diversity.metric,
    "energy": energy.metric,
    "fid": frechet.fid,
    "frame_consistency": frame_consistency.metric,
    "frechet": frechet.metric,
    "inception_score": inception_score.metric,
    "kid": kid.metric,
    "memorisation": memorisation.metric,
    "per_class": per_class.metric,
    "precision_recall": precision_recall.metric,
    "r_precision": clip_score.r_precision,
    "recognition": recognition.metric,
    "retrieval": retrieval.metric,
    "sfid": frechet.sfid,
    "wasserstein": wasserstein.metric,
}
