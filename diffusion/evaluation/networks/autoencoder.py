"""Latents of a KL autoencoder (Rombach et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.evaluation.networks.folder import exact, opened
from diffusion.evaluation.networks.network import Network, Run


def autoencoder(folder: str) -> Network:
    """The encoder of an autoencoder, from diffusers' folder of an ``AutoencoderKL``.

    Its "features" [B, h w C] are the modes of the latents, scaled as a diffusion model sees them,
    of pictures in their own size: features of pictures of two sizes are not comparable. The name
    has the beginning of the weights' checksum, such as "kl_1f3a5c7e".

    They see a blurred copy of the picture. Pictures that differ by a shift are far apart in them.
    """
    opening, files = opened(folder, "AutoencoderKL")
    net = opening.module
    if net.in_channels not in (1, 3):
        raise ValueError(f"{folder}: expected 1 or 3 channels of pictures, got {net.in_channels}")

    def open_weights() -> Run:
        params = opening.load()

        @exact
        def run(params: Any, x: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32) / 127.5 - 1
            mode = net.apply({"params": params}, x, method="encode").mode()
            return net.to_latents(mode).reshape(len(x), -1)

        def features(x: np.ndarray, _: Sequence[Any]) -> dict[str, np.ndarray]:
            grey = x[..., : net.in_channels]
            if (grey != x).any():
                raise ValueError(f"{folder} is an autoencoder of grey pictures, got colours")
            return {"features": run(params, np.ascontiguousarray(grey))}

        return features

    network = Network("kl", open_weights, files=files, preparation="own size", batch=16)
    return replace(network, name=f"kl_{network.checksum[:8]}")
