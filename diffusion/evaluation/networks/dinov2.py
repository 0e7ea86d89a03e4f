"""Features of DINOv2, in which FD-DINOv2 is taken (Stein et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.evaluation.networks.folder import exact, opened
from diffusion.evaluation.networks.network import Network, Run
from diffusion.evaluation.resize import pillow_bicubic, torch_bicubic
from diffusion.models.lpips import MEAN, STD
from diffusion.specs import unknown

SIZE = 224
SIZES = {384: "s", 768: "b", 1024: "l", 1536: "g"}  # width -> small, base, large, giant
RESIZES = {
    "torch": "PyTorch's antialiased bicubic to 224 x 224, not rounded",
    "pil": "PIL bicubic to 224 x 224, rounded",
}


def dinov2(model: str, resize: str = "torch") -> Network:
    """DINOv2 from transformers' folder or an id on the hub; "features" [B, width].

    They are the class token after the last norm, 1024 numbers for ViT-L/14. The network's name has
    width and patch, such as "dinov2_vitl14".

    Args:
      model: a folder with config.json and ``.safetensors``, or an id, which is fetched.
      resize: "torch" or "pil", the latter as dgm-eval has it; figures of the two differ.
    """
    if resize not in RESIZES:
        raise unknown("dinov2(resize)", resize, RESIZES)
    opening, files = opened(model, "Dinov2Model")
    net = opening.module
    if SIZE % net.patch or net.channels != 3:
        raise ValueError(
            f"{model}: expected 3 channels and patches that divide {SIZE} pixels, got "
            f"{net.channels} and {net.patch}"
        )

    def open_weights() -> Run:
        params = opening.load()

        @exact
        def run(params: Any, x: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32) / 255
            x = (x - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]
            return net.apply({"params": params}, x)[:, 0]

        def features(x: np.ndarray, _: Sequence[Any]) -> dict[str, np.ndarray]:
            fitted = pillow_bicubic(x, SIZE) if resize == "pil" else torch_bicubic(x, SIZE)
            return {"features": run(params, fitted)}

        return features

    kind = SIZES.get(net.width, str(net.width))
    name = f"dinov2_vit{kind}{net.patch}" + ("_pil" if resize == "pil" else "")
    return Network(name, open_weights, files=files, preparation=RESIZES[resize], batch=32)
