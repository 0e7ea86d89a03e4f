"""Whether pictures resemble real pictures whose captions say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.evaluation.intervals import of_mean
from diffusion.evaluation.metrics.clip_score import cosines
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.neighbours import nearest
from diffusion.evaluation.networks.network import PIXELS, Network


def metric(captions: Network, features: Network = PIXELS, reference: str = "") -> Metric:
    """The mean cosine of a picture's caption and that of the real picture that is nearest to it.

    caption_similarity_ENCODER_NETWORK, its interval; "_real" is of real pictures beside the other
    real ones, "_chance" of captions and those of random real pictures. Unlike ``retrieval`` it
    counts a picture of another caption with nearly the same meaning as nearly right.

    Args:
      captions: a network with the output "text", such as ``sentences("FOLDER")``.
      features: the network in whose features pictures are near.
      reference: the real pictures, which have captions.
    """
    if "text" not in captions.outputs:
        raise ValueError(
            f'caption_similarity needs a network of texts, sentences("FOLDER") or clip("FOLDER"), '
            f"got {captions.name}"
        )

    def embedded(texts: Sequence[Any]) -> np.ndarray:
        different, place = np.unique(np.asarray(texts), return_inverse=True)
        none = np.zeros((len(different), 1, 1, 3), np.uint8)  # of pictures it sees nothing
        return captions(none, different.tolist(), ("text",))["text"][place]

    def measure(judged: Judged) -> dict[str, Any]:
        samples, real = judged.samples, judged.real(reference)
        for examples in (samples, real):
            if not examples.subjects or not all(isinstance(s, str) for s in examples.subjects):
                raise ValueError(
                    f"caption_similarity needs a caption of each example; {examples.name} has none"
                )
        own, known = embedded(samples.subjects), embedded(real.subjects)
        x, y = samples.array(), real.array()
        found = cosines(own, known[nearest(x, y)[1][:, 0]])
        others = nearest(y, y, 2)[1]
        others = np.where(others[:, 0] == np.arange(len(y)), others[:, 1], others[:, 0])
        name = f"caption_similarity_{captions.name}"
        return {
            judged.name(name): float(found.mean()),
            judged.name(f"{name}_ci"): of_mean(found),
            judged.name(f"{name}_real"): float(cosines(known, known[others]).mean()),
            judged.name(name) + "_chance": float(own.mean(0) @ known.mean(0)),
        }

    return Metric(measure, network=features, references=(reference,))
