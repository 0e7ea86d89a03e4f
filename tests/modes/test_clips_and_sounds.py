"""References of clips and of waveforms, and samples that are kept, drawn and judged by them."""

import numpy as np
import pytest

from configs import base
from diffusion.evaluation import references, sample_files, selection
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.frechet import frechet_distance
from diffusion.evaluation.metrics.metric import Metric, of_array
from diffusion.evaluation.networks.network import pixels
from diffusion.evaluation.shards import Shards
from diffusion.modes import reference

RNG = np.random.default_rng(0)
CLIPS = RNG.integers(0, 256, (12, 3, 2, 4, 3), np.uint8)
SOUNDS = RNG.uniform(-1, 1, (12, 9)).astype(np.float32)
KINDS = [("arr_0", CLIPS, "3x2x4"), ("x", SOUNDS, "9"), ("x", SOUNDS[..., None], "9")]


def in_float(x):
    return x / 127.5 - 1.0 if x.dtype == np.uint8 else x


@pytest.mark.parametrize(("name", "x", "size"), KINDS)
def test_a_reference_is_made_and_judges(tmp_path, name, x, size):
    np.savez(tmp_path / "real.npz", **{name: x[:6]})
    config = base.get_config()
    config.evaluation.samples = str(tmp_path / "real.npz")
    config.evaluation.features = "pixels"
    reference.run(config, str(tmp_path / "made"))
    path = tmp_path / "made" / f"real_{size}_pixels.npz"
    real = references.read(str(path), pixels())
    assert real.shape == x.shape[1:] and real.count == 6
    metrics = selection.make([f"frechet(pixels, '{path}')"], None)
    found = Harness(metrics).evaluate(of_array(x[6:]))["fd_pixels"]
    expected = frechet_distance(*(in_float(part) for part in (x[6:], x[:6])))
    assert found == pytest.approx(expected, rel=1e-5)


def test_kept_clips_can_be_judged_again(tmp_path):
    shards, judge = Shards(5, tmp_path), Harness({"m": Metric(lambda _: {}, network=pixels())})
    judge.collect(of_array(in_float(CLIPS) * 1.5), None, shards, keep="samples")
    kept = sample_files.read(str(tmp_path / "samples"))
    expected = np.round((np.clip(in_float(CLIPS) * 1.5, -1, 1) + 1) * 127.5)
    np.testing.assert_array_equal(kept.draw(0, 12), expected)


def test_clips_of_another_range_are_refused(tmp_path):
    np.savez(tmp_path / "clips.npz", x=CLIPS.astype(np.float32))
    with pytest.raises(ValueError, match=r"x is float in .*; expected \[-1, 1\], or uint8"):
        sample_files.read(str(tmp_path / "clips.npz"))
