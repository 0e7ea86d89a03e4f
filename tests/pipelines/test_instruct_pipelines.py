"""A published pipeline that learned to edit is one that diffusers knows."""

import diffusers
import jax
import numpy as np
import pytest
import tiny_pipelines as tiny

from diffusion import pipelines
from diffusion.adapters.instruct import instruct
from diffusion.objectives.adapting import OWN
from diffusion.pipelines import adapted, joint
from diffusion.pipelines.pipeline import Defaults


def test_stable_diffusion_becomes_instruct_pix2pix(tmp_path):
    tiny.whole(folder=tmp_path / "base")
    base, params = pipelines.load(tmp_path / "base")
    adapter, guidance = instruct(), ("instruct(3.0, 1.5)",)
    made = adapted.pipeline(base, adapter, Defaults("", "uniform", 4, guidance))
    own = adapter.init(jax.random.key(0), joint.params(base, params))
    assert not any(path.startswith("text/") for path in own)
    noise = np.random.default_rng(0).normal(0, 0.1, own["image/conv_in/kernel"].shape)
    own["image/conv_in/kernel"] += noise.astype(np.float32)  # as if it were trained
    trained = adapted.load(base, params, adapter, {OWN: own})
    pipelines.save_pretrained(tmp_path / "made", made, trained)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "made")
    assert type(theirs) is diffusers.StableDiffusionInstructPix2PixPipeline
    again, read = pipelines.load(tmp_path / "made")
    assert again.edits and not base.edits and again.image_network.in_channels == 8
    np.testing.assert_array_equal(
        read["network"]["conv_in"]["kernel"], trained["network"]["conv_in"]["kernel"]
    )
    with pytest.raises(ValueError, match="edits pictures already"):
        adapted.pipeline(again, adapter, made.defaults)
