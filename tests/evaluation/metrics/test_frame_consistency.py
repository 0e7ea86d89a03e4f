"""Consistency of frames: its value where the features are known, and still clips told apart."""

from itertools import pairwise

import numpy as np
import pytest

from diffusion.data.sources import Source
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.intervals import of_mean
from diffusion.evaluation.metrics import frame_consistency
from diffusion.evaluation.metrics.metric import Data, of_array
from diffusion.evaluation.networks.network import Network, pixels

RNG = np.random.default_rng(0)
SPRITES = RNG.integers(0, 256, (11, 5, 6, 4, 3), np.uint8)


def colours():
    """The mean of each channel of pictures."""
    return Network("colours", lambda: lambda x, _: {"features": x.mean((1, 2))}, batch=4)


def judged(x, real=SPRITES):
    source = Source("clips", len(real), real.shape[1:], lambda i: {"x": real[i] / 127.5 - 1})
    metric = frame_consistency.metric(colours())
    return Harness({"m": metric}, None, lambda: Data(source, source)).evaluate(of_array(x))


def test_figures_are_means_over_pairs_and_clips():
    cosine, motion = [], []
    for clip in SPRITES.astype(np.float64):
        features = clip.mean((1, 2))
        pairs = list(pairwise(features))
        cosine.append(np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]))
        motion.append(np.mean([np.abs(b - a).mean() for a, b in pairwise(clip)]))
    figures = judged(SPRITES)
    for name, values in (("frame_consistency", cosine), ("frame_motion", motion)):
        for end in ("", "_real"):
            assert figures[f"{name}_colours{end}"] == pytest.approx(np.mean(values), rel=1e-6)
            assert figures[f"{name}_colours{end}_ci"] == pytest.approx(of_mean(values), rel=1e-6)
    assert set(figures["provenance"]["m"]["figures"]) == figures.keys() - {"provenance"}
    assert figures["provenance"]["m"]["network"] == "frames_colours"


def test_still_clips_are_consistent_and_do_not_move():
    still = np.broadcast_to(SPRITES[:, :1], SPRITES.shape)
    grey = np.full_like(SPRITES, 99)
    for x in (still, still / np.float32(127.5) - 1, grey):
        figures = judged(x)
        assert figures["frame_consistency_colours"] == pytest.approx(1, abs=1e-6)
        assert figures["frame_consistency_colours"] > figures["frame_consistency_colours_real"]
        assert figures["frame_motion_colours"] == 0 < figures["frame_motion_colours_real"]


def test_what_has_no_neighbouring_frames_is_refused():
    with pytest.raises(ValueError, match="two frames at least"):
        judged(SPRITES[:, :1], SPRITES[:, :1])
    with pytest.raises(
        ValueError, match=r"judges clips \[N, T, H, W, 1 or 3\], got \(11, 6, 4, 3\)"
    ):
        judged(SPRITES[:, 0], SPRITES[:, 0])
    for network in (pixels(), frame_consistency.of_frames(colours())):
        with pytest.raises(ValueError, match="needs features of pictures"):
            frame_consistency.metric(network)
