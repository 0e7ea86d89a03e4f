"""Tiny runs, trained for two steps as a user does."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from configs import digits as digits_config
from configs import emoji_text_to_image
from diffusion import pretrained
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.modes import train
from diffusion.pipelines import gallery
from diffusion.pretrained.models import shapes

COLOURS, THINGS = ("red", "blue", "black", "green"), ("cat", "house", "sea", "river")
CAPTIONS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
QUICK = dict(name="sgd", learning_rate=0.1, decay="constant", warmup=0, clip_norm=0.0)
"""An optimiser that is compiled quickly."""


def digits():
    """The config of a class-conditional U-Net of pixels."""
    c = digits_config.get_config()
    c.model.unet.update(widths=(8, 16), num_heads=2, norm_groups=4)
    c.optimizer.update(**QUICK)
    c.ema = "constant(decay=0.5)"
    c.train.update(steps=2, batch_size=16, log_every=1)
    c.sampler.update(steps=4, batch_size=20)
    c.samples.columns = 2
    c.evaluation.metrics = ()
    return c


def captioned(folder: Path):
    """The config of a DiT of latents with a text encoder of its own, whose data lie in a folder."""
    rng = np.random.default_rng(0)
    net = AutoencoderKL(
        widths=(8, 8), blocks=1, latent_channels=2, mid_attention=False, norm_groups=4
    )
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes(net))
    pretrained.save(folder / "autoencoder", net, params)
    images = rng.integers(0, 256, (32, 8, 8, 4), np.uint8)
    np.savez(folder / "pairs.npz", images=images, caption=np.array(2 * CAPTIONS))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    c = emoji_text_to_image.get_config()
    c.data.update(name="captioned", dir=str(folder / "pairs.npz"), size=8, held_out=0.2)
    c.data.tokenizer = str(folder / "tokenizer")
    c.data.autoencoder, c.data.cache = str(folder / "autoencoder"), str(folder / "cache")
    c.model.name = "dit"
    c.model.dit.update(width=16, depth=1, heads=2, patch=4, cross_attention=True, pooled=True)
    c.model.text.update(width=16, depth=1, heads=2)
    c.optimizer.update(**QUICK)
    c.train.update(steps=2, batch_size=8, log_every=1, sample_every=0)
    c.sampler.update(steps=2, batch_size=8)
    c.samples.update(columns=2, count=4)
    c.evaluation.metrics = ()
    return c


def trained(config, workdir: Path):
    """(samples [N, ...], subjects) of the grid that the run draws at the end of training."""
    grids, save = [], gallery.save_grid

    def record(path, pipeline, x, subjects, *rest):
        grids.append((x, subjects))
        save(path, pipeline, x, subjects, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "save_grid", record)
        train.run(config, str(workdir))
    return grids[-1]
