"""Codecs: between examples and what a network sees of them, such as an autoencoder's latents.

A codec has no parameters of its own: it is given the pipeline's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.levels import Array
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.pipelines import tiles
from diffusion.sampling.sample import image_noise

POSTERIOR = 2**30  # fold of the keys
BATCH = 64  # examples decoded at once


class Codec:
    """The network sees the examples themselves; others derive.

    Attributes:
      factor: pixels per number of the network's grid, along each side.
    """

    factor: int = 1

    def encode(
        self,
        params: Mapping[str, Any],
        x: Array,
        keys: jax.Array | None = None,
        *,
        scaled: bool = True,
    ) -> Array:
        """What the network sees of examples x [B, ...]; keys [B] where there is chance in it.

        Without ``scaled`` it is as a network sees pictures that it edits.
        """
        return jnp.asarray(x)

    def decode(
        self, params: Mapping[str, Any], z: Array, numbers: Sequence[int] | None = None
    ) -> Array:
        """Examples [B, ...] of what the network sees."""
        return jnp.asarray(z)

    def decode_all(self, params: Mapping[str, Any], z: np.ndarray) -> np.ndarray:
        """``decode`` of however many examples [..., h, w, C], a few at a time."""
        return z


@dataclass(frozen=True)
class KL(Codec):
    """The scaled latents of a KL autoencoder, whose parameters are ``params["autoencoder"]``.

    Attributes:
      network: the autoencoder.
      tile: pixels of the tiles that large pictures are cut into, to save memory; 0: none.
    """

    network: AutoencoderKL
    tile: int = 0

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return self.network.factor

    @property
    def channels(self) -> int:
        """Channels of images."""
        return self.network.in_channels

    @property
    def _tiling(self) -> tiles.Tiling | None:
        return tiles.Tiling(self.tile) if self.tile else None

    def encode(
        self,
        params: Mapping[str, Any],
        x: Array,
        keys: jax.Array | None = None,
        *,
        scaled: bool = True,
    ) -> Array:
        """Latents [B, h, w, C] of images [B, H, W, 3] in [-1, 1].

        With keys [B] a sample of the autoencoder's posterior, without them its mode. ``scaled`` as
        the network sees them; else as they are.
        """
        net, weights = self.network, params["autoencoder"]
        z = tiles.encode(net, weights, x, self._tiling)
        latents = jnp.asarray(z.mean)
        if keys is not None:
            noise = image_noise(folded(keys, POSTERIOR), latents.shape[1:])
            latents = latents + jnp.exp(0.5 * z.log_variance) * noise
        return net.to_latents(latents) if scaled else latents

    def decode(
        self, params: Mapping[str, Any], z: Array, numbers: Sequence[int] | None = None
    ) -> Array:
        """Images [B, H, W, 3], clipped to [-1, 1], float32, of scaled latents.

        What overflows in half precision is decoded again in float32, with a warning. Errors call
        the images by ``numbers``.

        Raises:
          FloatingPointError: an image is not finite, though its latents are.
        """
        net, weights = self.network, params["autoencoder"]
        images = tiles.decode(net, weights, net.from_latents(z), self._tiling)
        if not np.isfinite(images).all() and jnp.dtype(net.computation) != jnp.float32:
            warnings.warn(
                f"the autoencoder overflowed in {jnp.dtype(net.computation)}: these pictures are "
                "decoded again in float32",
                stacklevel=2,
            )
            net = net.clone(dtype=jnp.float32)
            weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), weights)
            images = tiles.decode(net, weights, net.from_latents(z), self._tiling)
        images = np.asarray(images, np.float32)
        check_finite(images, "the autoencoder made of finite latents", numbers)
        return jnp.clip(images, -1, 1)

    def decode_all(self, params: Mapping[str, Any], z: np.ndarray) -> np.ndarray:
        """Images [..., H, W, 3], ``BATCH`` at a time, compiled once."""
        flat, parts = np.asarray(z, np.float32).reshape(-1, *z.shape[-3:]), []
        for start in range(0, len(flat), BATCH):
            index = np.minimum(np.arange(start, start + BATCH), len(flat) - 1)
            images = self.decode(params, flat[index], index)
            parts.append(np.asarray(images)[: len(flat) - start])
        images = np.concatenate(parts)
        return images.reshape(*z.shape[:-3], *images.shape[1:])

    def moments(self, params: Mapping[str, Any], x: Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation [B, h, w, C] of the scaled latents of images."""
        return _moments(self.network, params["autoencoder"], jnp.asarray(x))


def check_finite(x: np.ndarray, what: str, numbers: Sequence[int] | None = None) -> None:
    """Raises FloatingPointError, naming the examples of x [B, ...] that are not finite."""
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
    if len(bad):
        named = bad if numbers is None else np.asarray(numbers)[bad]
        listed = ", ".join(map(str, named[:8])) + (", ..." if len(bad) > 8 else "")
        raise FloatingPointError(
            f"{what} values that are not finite: {len(bad)} of {len(x)}, numbers {listed}. Damaged "
            "or diverged parameters, strong guidance or float16 may be why"
        )


def folded(keys: jax.Array, fold: int) -> jax.Array:
    """Other keys [B] for another purpose."""
    return jax.vmap(lambda key: jax.random.fold_in(key, fold))(keys)


@partial(jax.jit, static_argnums=0)
def _moments(net: AutoencoderKL, params: Any, images: Array) -> tuple[jax.Array, jax.Array]:
    moments = net.apply({"params": params}, images, method="encode")
    mean = net.to_latents(moments.mean)
    # to_latents is affine: a deviation is what it makes of the difference.
    above = net.to_latents(moments.mean + jnp.exp(0.5 * moments.log_variance))
    return mean, above - mean
