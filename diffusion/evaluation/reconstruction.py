"""How well an autoencoder reconstructs held-out images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.data.sources import Source
from diffusion.evaluation import figures
from diffusion.objectives.kl_autoencoder import Autoencoding

BATCH = 64  # images that are encoded at once
MEASURED = 2048  # training images whose latents' deviation is measured


def save_grid(
    path: Path, objective: Autoencoding, params: Any, source: Source, columns: int
) -> None:
    """Three rows of images, each above its reconstructions, into a PNG."""
    columns = min(columns, len(source))
    index = np.random.default_rng(0).permutation(len(source))[: 3 * columns]
    index = index[: len(index) // columns * columns]
    function = partial(_reconstruct, objective, params)
    x, y = (np.concatenate(parts) for parts in zip(*_in_batches(function, source, index)))
    rows = [part[k : k + columns] for k in range(0, len(x), columns) for part in (x, y)]
    names = ["original", "reconstruction"] * (len(rows) // 2)
    figures.save_png(path, figures.image_grid(np.concatenate(rows), columns, row_names=names))


def measure(objective: Autoencoding, params: Any, train: Source, held_out: Source) -> dict:
    """How well held-out images are reconstructed, and the deviation of training images' latents.

    psnr is 10 log10(4 / mse) in dB, averaged over images; they are in [-1, 1], and reconstructions
    are clipped to that.
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
