"""A pretrained model is swept, judged and given learned solvers like a run."""

import json

import numpy as np
import pytest
import tiny_pipelines as tiny
from commands import newest
from tiny_runs import CAPTIONS

from configs import base
from diffusion.modes import evaluate, learn, sample, sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion, and captioned pictures."""
    folder = tmp_path_factory.mktemp("pretrained")
    tiny.whole(folder=folder / "sd")
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    np.savez(folder / "pairs.npz", images=images, caption=np.array(2 * CAPTIONS))
    return folder


@pytest.fixture
def config(folder):
    """Draws from the model, with these data."""
    c = base.get_config()
    c.model.path = str(folder / "sd")
    c.data.update(name="captioned", dir=str(folder / "pairs.npz"), size=16, held_out=0.2)
    c.sampler.update(steps=4, batch_size=4, guidance="cfg(3)")
    c.samples.update(count=4, columns=2)
    c.evaluation.count = 4
    c.sweep.update(solvers=("ddim", "EulerDiscreteScheduler"), evaluations=(2, 4))
    c.sweep.update(reference="dpmpp_2m", reference_steps=4)
    c.learn.update(evaluations=(4,), teacher="ddim", teacher_steps=8, count=4, held_out=4, test=4)
    c.learn.update(batch_size=4, iterations=2, against=("ddim", "dpmpp_2m"), grids=("uniform",))
    return c


def test_evaluate(config, tmp_path):
    config.evaluation.metrics = ("caption_gap(draws=1)", "retrieval()", "memorisation()")
    evaluate.run(config, str(tmp_path))
    found = json.loads((newest(tmp_path / "evaluations") / "evaluation.json").read_text())
    assert found["retrieval_pictures"] == 4 and 2 <= found["retrieval_captions"] <= 4
    assert found["captions_count"] == 2 * found["retrieval_captions"]
    assert all(np.isfinite(v) for v in found.values() if isinstance(v, float))
    assert found["captions_loss"] > 0 and found["nearest_train_pixels"] > 0
    assert found["captions_loss"] != found["captions_loss_other"]


def test_sweep(config, tmp_path):
    config.evaluation.metrics = ("memorisation()",)
    sweep.run(config, str(tmp_path))
    text = (newest(tmp_path / "sweeps") / "sweep.json").read_text()
    for name in ("ddim", "EulerDiscreteScheduler"):
        assert name in text and name in (newest(tmp_path / "sweeps") / "sweep.md").read_text()
    assert "nearest_train" in text
    assert (newest(tmp_path / "sweeps") / "sweep.png").stat().st_size > 0


def test_learned_solvers_are_drawn_with(config, tmp_path):
    with pytest.raises(ValueError, match=r"config\.samples\.prompt is not given"):
        learn.run(config, str(tmp_path))
    config.samples.prompt = "a red cat"
    learn.run(config, str(tmp_path))
    row = json.loads((tmp_path / "learned.json").read_text())["rows"][0]
    assert row["evaluations"] == 4 and row["learned"] > 0 and row["best_fixed"] > 0
    config.sampler.solver = f"from_file(path='{tmp_path / 'learned_4.npz'}')"
    sample.run(config, str(tmp_path))
    drawn = np.load(newest(tmp_path / "samples") / "samples.npz")
    assert drawn["x"].shape == (4, 8, 8, 4) and drawn["image"].shape == (4, 16, 16, 3)
    assert drawn["caption"].tolist() == 4 * ["a red cat"]
