"""Whole runs of autoencoder training, on tiny networks."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from configs import base
from diffusion import pretrained
from diffusion.config.experiment import build
from diffusion.data import sources
from diffusion.modes import sample, train
from diffusion.runs.restore import restore_ema


def config():
    c = base.get_config()
    c.objective.name = "autoencoding"
    c.model.name = "autoencoder"
    c.model.autoencoder.update(
        widths=(8,), blocks=1, latent_channels=2, norm_groups=4, mid_attention=False
    )
    c.autoencoding.adversary = "hinge"
    c.autoencoding.adversary_start = 2
    c.autoencoding.discriminator.update(width=4, layers=1)
    c.train.steps = 4
    c.train.batch_size = 16
    c.train.log_every = 2
    c.train.sample_every = 4
    c.samples.columns = 5
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    train.run(config(), str(folder))
    return folder


def test_a_run_leaves_pictures_metrics_and_the_model(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["adaptive_weight"] == 0 and lines[1]["adaptive_weight"] > 0
    assert {"reconstruction", "kl", "adversary", "logits_real"} <= lines[1].keys()
    for name in ("reconstructions.png", "loss.png", "grids/step_0000004.png"):
        assert Image.open(trained / name).width > 100


def test_what_draws_nothing_is_refused(trained):
    c = config()
    with pytest.raises(ValueError, match=r"--workdir=.*'autoencoder' draws nothing.*/autoencoder"):
        sample.run(c, str(trained))


def test_the_model_is_diffusers_with_latents_of_unit_variance(trained):
    loaded = pretrained.load(trained / "autoencoder")
    net, params = loaded.module, loaded.params
    average, _ = restore_ema(trained, "ema")
    jax.tree.map(np.testing.assert_array_equal, params, average["network"])
    x = sources.digits("test").all()["x"]
    latents = jax.jit(lambda x: net.apply({"params": params}, x, method="encode"))(x)
    train = sources.digits("train").all()["x"]
    of_train = jax.jit(lambda x: net.apply({"params": params}, x, method="encode"))(train)
    z = net.to_latents(of_train.sample(jax.random.key(0)))
    assert abs(np.std(z) - 1) < 0.02

    theirs = diffusers.AutoencoderKL.from_pretrained(trained / "autoencoder")
    with torch.no_grad():
        y = theirs.decode(torch.from_numpy(np.moveaxis(np.array(latents.mean), -1, 1))).sample
    errors = ((np.moveaxis(y.numpy(), 1, -1).clip(-1, 1) - x) ** 2).mean((1, 2, 3))
    result = json.loads((trained / "evaluation.json").read_text())
    np.testing.assert_allclose(result["psnr"], (10 * np.log10(4 / errors)).mean(), rtol=1e-4)
    assert result["num_held_out"] == len(x) and result["latent_shape"] == [8, 8, 2]
    np.testing.assert_allclose(theirs.config.scaling_factor, 1 / result["latent_std"], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.name": "unet"}, "config.model.name='unet'"),
        ({"autoencoding.distance": "l3"}, "config.autoencoding.distance: unknown 'l3'"),
        ({"autoencoding.adversary": "hing"}, "Did you mean 'hinge'"),
        ({"autoencoding.adversary_start": 4}, "adversary_start=4 is not before"),
        ({"autoencoding.kl_weight": -1.0}, r"config.autoencoding.kl_weight must be >= 0"),
        ({"autoencoding.perceptual": "lpips.pth"}, "config.autoencoding.perceptual"),
        ({"autoencoding.discriminator.layers": 3}, "config.autoencoding.discriminator: layers=3"),
        ({"model.autoencoder.norm_groups": 3}, "config.model.autoencoder: norm_groups=3"),
        ({"model.autoencoder.widths": (4, 4, 4, 4, 4)}, "image size 8 is not divisible by 16"),
        ({"data.name": "points"}, "trained on square images"),
    ],
)
def test_mistakes_name_their_field(changes, message):
    c = config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        build(c)
