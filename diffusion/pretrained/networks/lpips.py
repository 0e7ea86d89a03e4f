"""LPIPS's weights from a safetensors file: those of VGG16, and of the five linear layers on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.lpips import LPIPS
from diffusion.pretrained import files, weights
from diffusion.pretrained.names import POINTWISE, Names, Row, dotted

NAMES = Names(
    dotted(),
    rows=(Row((r"(lin\d)/kernel",), (r"\1.model.1.weight",), POINTWISE),),
    ignored=r"classifier\..*|scaling_layer\..*",
)
"""``features.N.weight`` and ``.bias``, N = 0, 2, 5, ..., 28, and ``linK.model.1.weight``."""


def load(path: str | Path) -> dict[str, Any]:
    """The parameters of ``LPIPS`` in a ``.safetensors`` file with the keys of ``NAMES``.

    These are torchvision's keys of VGG16 (its ``classifier`` is passed over) and the lpips
    package's of its linear layers. Where torchvision and lpips are installed:

        lins = lpips.LPIPS(net="vgg").lins
        tensors = {f"lin{k}.model.1.weight": lins[k].model[1].weight.data for k in range(5)}
        vgg = torchvision.models.vgg16(weights="IMAGENET1K_V1").features.state_dict()
        tensors |= {f"features.{key}": value for key, value in vgg.items()}
        safetensors.torch.save_file(tensors, "lpips.safetensors")

    Raises:
      FileNotFoundError, ValueError: there is no such file; it is a pickle; tensors are missing,
        unexpected or misshapen.
    """
    tensors = files.open_file(path)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]
    return weights.load_params(NAMES, shapes, tensors, what=str(path))
