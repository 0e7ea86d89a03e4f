"""LPIPS as the network of metrics that compare pictures in pairs (Zhang et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.evaluation.networks.folder import exact
from diffusion.evaluation.networks.network import Network, existing
from diffusion.models.lpips import LPIPS
from diffusion.pretrained.networks import lpips as weights_of

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
BATCH = 32


def lpips(weights: str) -> Network:
    """LPIPS with VGG16, from a ``.safetensors`` file as ``pretrained.networks.lpips.load`` reads.

    Its output "pictures" [B, H, W, 3] is the uint8 pictures themselves; ``distance`` compares them.
    """
    path = existing("lpips", weights)
    return Network(
        "lpips", lambda: lambda x, _: {"pictures": x}, ("pictures",), (path,), "own size"
    )


def distance(network: Network) -> Distance:
    """(uint8 x [N, H, W, 3], y) -> LPIPS [N], with the weights of a network of ``lpips``."""
    return _opened(str(network.files[0]))


@cache
def _opened(path: str) -> Distance:
    params = weights_of.load(path)

    @exact
    def run(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        return LPIPS().apply(
            {"params": params}, *(a.astype(jnp.float32) / 127.5 - 1 for a in (x, y))
        )

    def all_pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(x), BATCH):
            index = np.minimum(np.arange(start, start + BATCH), len(x) - 1)
            parts.append(np.asarray(run(params, x[index], y[index]))[: len(x) - start])
        return np.concatenate(parts).astype(np.float64)

    return all_pairs
