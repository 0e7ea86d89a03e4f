"""Between pictures and the latents that networks see."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.autoencoder import AutoencoderKL, Gaussian
from diffusion.pipelines import tiles
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.sampling.sample import image_noise

POSTERIOR = 2**30  # fold of the keys


def encode(
    pipeline: Pipeline,
    params: Params,
    images: Array,
    keys: jax.Array | None = None,
    *,
    scaled: bool = True,
) -> jax.Array:
    """Latents [B, h, w, C] of images [B, H, W, 3] in [-1, 1].

    With keys [B] a sample of the autoencoder's posterior, without them its mode. ``scaled`` as the
    network sees them; else as they are.
    """
    net, weights = pipeline.autoencoder, params["autoencoder"]
    if pipeline.tile:
        z = tiles.encode(net, weights, images, tiles.Tiling(pipeline.tile))
    else:
        z = _encode(net, weights, jnp.asarray(images))
    latents = jnp.asarray(z.mean)
    if keys is not None:
        noise = image_noise(folded(keys, POSTERIOR), latents.shape[1:])
        latents = latents + jnp.exp(0.5 * z.log_variance) * noise
    return net.to_latents(latents) if scaled else latents


def decode(pipeline: Pipeline, params: Params, latents: Array) -> jax.Array:
    """Images [B, H, W, 3], clipped to [-1, 1], float32, of scaled latents."""
    net, weights = pipeline.autoencoder, params["autoencoder"]
    z = net.from_latents(latents)
    if pipeline.tile:
        images = tiles.decode(net, weights, z, tiles.Tiling(pipeline.tile))
    else:
        images = _decode(net, weights, z)
    return jnp.clip(jnp.asarray(images, jnp.float32), -1, 1)


def folded(keys: jax.Array, fold: int) -> jax.Array:
    """Other keys [B] for another purpose."""
    return jax.vmap(lambda key: jax.random.fold_in(key, fold))(keys)


@partial(jax.jit, static_argnums=0)
def _encode(net: AutoencoderKL, params: Any, images: Array) -> Gaussian:
    return net.apply({"params": params}, images, method="encode")


@partial(jax.jit, static_argnums=0)
def _decode(net: AutoencoderKL, params: Any, z: Array) -> jax.Array:
    return net.apply({"params": params}, z, method="decode")
