"""I3D's weights from a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.i3d import FEWEST, I3D
from diffusion.pretrained import files, weights
from diffusion.pretrained.names import Names, substituted

NAMES = Names(substituted(("/", ".")), ignored=r".*\.num_batches_tracked")
"""pytorch-i3d's keys: ``Mixed_3b.b1a.conv3d.weight``, ``.bn.weight``, ``.bn.running_mean``, ..."""


def load(path: str | Path) -> dict[str, Any]:
    """The parameters of ``I3D`` in a ``.safetensors`` file with the keys of ``NAMES``.

    pytorch-i3d publishes the network for Kinetics-400 as a pickle, ``rgb_imagenet.pt``:

        tensors = torch.load("rgb_imagenet.pt", weights_only=True)
        safetensors.torch.save_file(tensors, "i3d.safetensors")

    Raises:
      FileNotFoundError, ValueError: there is no such file; it is a pickle; tensors are missing,
        unexpected or misshapen.
    """
    clip = jax.ShapeDtypeStruct((1, FEWEST, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(I3D().init, jax.random.key(0), clip)["params"]
    return weights.load_params(NAMES, shapes, files.open_file(path), what=str(path))
