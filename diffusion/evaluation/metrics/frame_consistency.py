"""How alike neighbouring frames of clips are, by any network of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.evaluation.intervals import of_mean
from diffusion.evaluation.metrics.clip_score import cosines
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.networks.network import Network, Run

OUTPUTS = {"consistency": "frame_consistency", "motion": "frame_motion"}


def of_frames(features: Network) -> Network:
    """A network of clips by one of pictures, with the outputs "consistency" and "motion", [B].

    They are means over pairs of neighbouring frames: of the cosine of their features, and of the
    difference between their pixels, without its sign, in grey levels 0..255.
    """

    def open_features() -> Run:
        def run(x: np.ndarray, subjects: Sequence[Any]) -> dict[str, np.ndarray]:
            clips, frames = x.shape[:2]
            if frames < 2:
                raise ValueError(f"frame_consistency compares two frames at least, got {x.shape}")
            each = [subject for subject in subjects for _ in range(frames)]
            values = features(x.reshape(-1, *x.shape[2:]), each)["features"]
            values = values.reshape(clips, frames, -1)
            cosine = cosines(values[:, :-1], values[:, 1:])
            moved = [np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in x]
            return {"consistency": cosine.mean(1), "motion": np.array(moved)}

        return run

    about = features.preparation
    name = f"frames_{features.name}"
    return Network(name, open_features, (*OUTPUTS,), features.files, about, clips=True, batch=8)


def metric(features: Network, reference: str = "") -> Metric:
    """frame_consistency_NETWORK, the mean cosine of neighbouring frames' features, in -1..1.

    A still clip reaches 1, so frame_motion_NETWORK stands beside it: the mean difference of their
    pixels, in grey levels. Both are means over clips, with their intervals and those of real clips.

    Args:
      features: a network of pictures, such as ``clip("FOLDER")``.
      reference: the real clips.
    """
    if not features.pictures or features.clips or "features" not in features.outputs:
        raise ValueError(
            f"frame_consistency needs features of pictures, such as clip('FOLDER') gives; the "
            f"network {features.name} gives none"
        )

    def measure(judged: Judged) -> dict[str, Any]:
        own, real, figures = judged.samples, judged.real(reference), {}
        for output, figure in OUTPUTS.items():
            name = f"{figure}_{features.name}"
            for examples, end in ((own, ""), (real, "_real")):
                values = examples.array(output)
                figures |= {
                    f"{name}{end}": float(values.mean()),
                    f"{name}{end}_ci": of_mean(values),
                }
        return figures

    return Metric(measure, (*OUTPUTS,), of_frames(features), references=(reference,))
