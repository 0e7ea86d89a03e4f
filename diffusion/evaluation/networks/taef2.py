"""Features of TAEF2, a small autoencoder of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.networks.folder import exact
from diffusion.evaluation.networks.network import Network, Run, existing
from diffusion.models.taef2 import TAEF2
from diffusion.pretrained.networks import taef2 as weights_of

SIZE = 64


def taef2(weights: str, size: int = SIZE) -> Network:
    """TAEF2's encoder from a ``.safetensors`` file with both halves; "features" [B, 672].

    Pictures are resized to size x size (bilinear, antialiased, not rounded). The features are the
    mean and the standard deviation, over all places, of the 64 channels at each of the four
    resolutions (512 numbers); the standard deviations of the 32 latents; and their means over each
    quarter of the picture (128). They have the same meaning for all sizes of pictures.

    They see colours, contrast, sharpness, noise, textures and roughly where things lie. They know
    no classes: a distance in them does not tell a plausible object from an odd one of the same
    texture, and what is finer than 1 / ``size`` of the picture is lost.
    """
    check_range("size", size, 16, 2048)
    if size % 16:
        raise ValueError(f"size={size}: expected a multiple of 16, such as {size // 16 * 16}")
    path = existing("taef2", weights)

    def open_weights() -> Run:
        params, net = weights_of.load(path), TAEF2()

        @exact
        def run(params: Any, x: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32) / 127.5 - 1
            x = jax.image.resize(x, (len(x), size, size, 3), "linear")
            stages = net.apply({"params": params}, x, method="stages")
            *activations, latents = stages
            parts = [a.mean((1, 2)) for a in activations] + [a.std((1, 2)) for a in stages]
            side = latents.shape[1] // 2
            quarters = latents.reshape(len(x), 2, side, 2, side, -1).mean((2, 4))
            return jnp.concatenate([*parts, quarters.reshape(len(x), -1)], axis=-1)

        def features(x: np.ndarray, _: Sequence[Any]) -> dict[str, np.ndarray]:
            return {"features": run(params, np.ascontiguousarray(x))}

        return features

    name = "taef2" if size == SIZE else f"taef2_{size}"
    about = f"bilinear, antialiased, to {size} x {size}"
    return Network(name, open_weights, files=(path,), preparation=about, batch=16)
