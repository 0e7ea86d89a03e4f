"""VGGish's weights from a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.vggish import PATCH, VGGish
from diffusion.pretrained import files, weights
from diffusion.pretrained.names import Names, dotted

NAMES = Names(dotted(), ignored=r"pproc\..*")
"""torchvggish's keys, ``features.N.weight`` and ``embeddings.N.weight``; its PCA is passed over."""


def load(path: str | Path) -> dict[str, Any]:
    """The parameters of ``VGGish`` in a ``.safetensors`` file with the keys of ``NAMES``.

    torchvggish publishes them as a pickle, ``vggish-10086976.pth``:

        tensors = torch.load("vggish-10086976.pth", weights_only=True)
        safetensors.torch.save_file(tensors, "vggish.safetensors")

    Raises:
      FileNotFoundError, ValueError: there is no such file; it is a pickle; tensors are missing,
        unexpected or misshapen.
    """
    patch = jax.ShapeDtypeStruct((1, *PATCH), jnp.float32)
    shapes = jax.eval_shape(VGGish().init, jax.random.key(0), patch)["params"]
    return weights.load_params(NAMES, shapes, files.open_file(path), what=str(path))
