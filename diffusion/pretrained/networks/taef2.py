"""TAEF2's weights from a safetensors file with the published layers' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.taef2 import TAEF2
from diffusion.pretrained import files, weights
from diffusion.pretrained.names import Names, dotted

NAMES = Names(dotted())
"""``encoder.N...`` and ``decoder.N...``, numbered as in TAESD's files of the two halves."""


def load(path: str | Path) -> dict[str, Any]:
    """The parameters of ``TAEF2``, in float32, in a ``.safetensors`` file with both halves.

    Raises:
      FileNotFoundError, ValueError: there is no such file; it is a pickle; tensors are missing,
        unexpected or misshapen.
    """
    tensors = files.open_file(path)
    picture = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = jax.eval_shape(TAEF2().init, jax.random.key(0), picture)["params"]
    return weights.load_params(NAMES, shapes, tensors, what=str(path))
