"""Training of autoencoders: from config to objective, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import pretrained, specs
from diffusion.config import optimizer
from diffusion.config.errors import field, wrong_types
from diffusion.data.sources import Source
from diffusion.evaluation import figures
from diffusion.models import discriminator
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.discriminator import PatchDiscriminator
from diffusion.models.lpips import LPIPS
from diffusion.objectives import distances
from diffusion.objectives.kl_autoencoder import Adversary, Autoencoding
from diffusion.pretrained.networks import lpips

if TYPE_CHECKING:
    from diffusion.config.experiment import Experiment

DISTANCES = {name: distances.CHOICES[name] for name in ("l1", "l2")}
BATCH = 64  # images that are encoded at once
MEASURED = 2048  # training images whose latents' deviation is measured


def make(config: ConfigDict, shape: tuple[int, ...], dtype: Any) -> Autoencoding:
    """The objective of config.autoencoding on images of this shape (H, W, C).

    Raises:
      ValueError: a field does not fit; the message names it.
    """
    c, at = config.autoencoding, "config.autoencoding"
    if len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(
            f"config.data.name={config.data.name!r}: an autoencoder is trained on square images, "
            f"these have shape {shape}"
        )
    if config.model.name != "autoencoder":
        raise ValueError(
            f"config.model.name={config.model.name!r}: config.objective.name='autoencoding' trains "
            "an autoencoder"
        )
    with field("config.model.autoencoder"), wrong_types():
        channels = {"in_channels": shape[-1], "out_channels": shape[-1]}
        network = AutoencoderKL(
            **config.model.autoencoder, **channels, sample_size=shape[0], dtype=dtype
        )
        network.check(shape[:2])
    if c.perceptual and shape[-1] != 3:
        raise ValueError(f"{at}.perceptual compares RGB images, these have shape {shape}")
    adversary = None
    if c.adversary:
        if c.adversary not in discriminator.CHOICES:
            raise specs.unknown(f"{at}.adversary", c.adversary, discriminator.CHOICES)
        if c.adversary_start >= config.train.steps:
            raise ValueError(
                f"{at}.adversary_start={c.adversary_start} is not before the last of "
                f"config.train.steps={config.train.steps}"
            )
        with field(f"{at}.discriminator"):
            judge = PatchDiscriminator(**c.discriminator, dtype=dtype)
            judge.check(shape[0])
        start = c.adversary_start
        tx = optimizer.make(config, config.train.steps - start).tx
        adversary = Adversary(
            judge, tx, discriminator.CHOICES[c.adversary], c.adversary_weight, start
        )
    return Autoencoding(
        network=network,
        distance=specs.function(c.distance, DISTANCES, f"{at}.distance"),
        kl_weight=c.kl_weight,
        perceptual=LPIPS(dtype=dtype) if c.perceptual else None,
        perceptual_weight=c.perceptual_weight,
        adversary=adversary,
        learned_variance=c.learned_variance,
    )


def frozen(config: ConfigDict) -> dict[str, Any]:
    """The weights of config.autoencoding.perceptual, where the objective has any."""
    path = config.autoencoding.perceptual
    if config.objective.get("name") != "autoencoding" or not path:
        return {}
    with field("config.autoencoding.perceptual"):
        return {"perceptual": lpips.load(path)}


@partial(jax.jit, static_argnums=0)
def _reconstruct(objective: Autoencoding, params: Any, x: jax.Array) -> jax.Array:
    return objective.reconstruct(params, x)


@partial(jax.jit, static_argnums=0)
def _encode(objective: Autoencoding, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    latents = objective.encode(params, x)
    return latents.mean, latents.log_variance


def _in_batches(function: Any, source: Source, index: np.ndarray) -> Iterator[Any]:
    """(x, function(x)) of the source's images x, compiled for one batch size."""
    for k in range(0, len(index), BATCH):
        part = index[k : k + BATCH]
        x = source.read(np.resize(part, BATCH))["x"]
        leaves, structure = jax.tree.flatten((x, function(x)))
        yield structure.unflatten([np.asarray(leaf)[: len(part)] for leaf in leaves])


def picture(experiment: Experiment, params: Any) -> np.ndarray:
    """Three rows of held-out images, each above its reconstructions; uint8."""
    source = experiment.held_out
    columns = min(experiment.config.samples.columns, len(source))
    index = np.random.default_rng(0).permutation(len(source))[: 3 * columns]
    index = index[: len(index) // columns * columns]
    function = partial(_reconstruct, experiment.objective, params)
    x, y = (np.concatenate(parts) for parts in zip(*_in_batches(function, source, index)))
    rows = [part[k : k + columns] for k in range(0, len(x), columns) for part in (x, y)]
    names = ["original", "reconstruction"] * (len(rows) // 2)
    return figures.image_grid(np.concatenate(rows), columns, row_names=names)


def measure(objective: Autoencoding, params: Any, train: Source, held_out: Source) -> dict:
    """How well held-out images are reconstructed, and the deviation of training images' latents.

    The peak signal-to-noise ratio is 10 log10(4 / mse) in dB of each image, averaged; images are in
    [-1, 1], reconstructions are clipped to that.
    """
    function = partial(_reconstruct, objective, params)
    errors = [
        ((x - y.astype(np.float64).clip(-1, 1)) ** 2).mean((1, 2, 3))
        for x, y in _in_batches(function, held_out, np.arange(len(held_out)))
    ]
    errors = np.maximum(np.concatenate(errors), 1e-12)
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:MEASURED])
    function = partial(_encode, objective, params)
    moments = [moments for _, moments in _in_batches(function, train, chosen)]
    mean, log_variance = (np.concatenate(parts, dtype=np.float64) for parts in zip(*moments))
    # Of samples, as a diffusion model sees them.
    std = float(np.sqrt(mean.var() + np.exp(log_variance).mean()))
    return {
        "psnr": float((10 * np.log10(4 / errors)).mean()),
        "mean_squared_error": float(errors.mean()),
        "num_held_out": len(held_out),
        "latent_shape": mean.shape[1:],
        "latent_std": std,
        "scaling_factor": 1 / std,
    }


def finish(experiment: Experiment, params: Any, folder: Path) -> None:
    """Writes loss.png, reconstructions.png, evaluation.json and ``autoencoder/``.

    The last is the network as diffusers saves it, its ``scaling_factor`` such that latents have a
    standard deviation of 1: what config.data.autoencoder takes.
    """
    objective, train = experiment.objective, experiment.train
    figures.loss_curve(folder / "loss.png", folder / "metrics.jsonl", title=f"{train.name}: loss")
    figures.save_png(folder / "reconstructions.png", picture(experiment, params))
    result = measure(objective, params, train, experiment.held_out)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    net = objective.network.clone(scaling_factor=result["scaling_factor"])
    pretrained.save(folder / "autoencoder", net, params["network"])
    print(
        "{num_held_out} held-out images are reconstructed to {psnr:.2f} dB; latents {latent_shape} "
        "of standard deviation {latent_std:.3f}".format(**result)
    )
