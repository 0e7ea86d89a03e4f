"""Metrics: one file each, named after what it measures.

A metric is

    metric(pipeline, params, data, draw) -> {name: figure}

with ``pipeline`` a model and all that it takes to use it, ``params`` its weights, ``data`` the real
examples (``metrics.metric.Data``), and ``draw()`` the samples that are judged, the same ones for
all metrics. Figures are what JSON can hold; a figure of real data that stands beside another has
its name with ``_real``. ``metric`` in each file makes one from its options, which it checks; its
name in ``CHOICES`` is what a config calls it.
"""

from diffusion.evaluation.metrics import (
    bits,
    caption_gap,
    energy,
    frechet,
    memorisation,
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
    "recognition": recognition.metric,
    "retrieval": retrieval.metric,
    "wasserstein": wasserstein.metric,
}
