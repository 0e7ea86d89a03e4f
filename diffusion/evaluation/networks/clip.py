"""Embeddings of pictures and of their captions by CLIP (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.evaluation.networks.folder import Lazy, exact, opened, tokens
from diffusion.evaluation.networks.network import Network, Run
from diffusion.evaluation.resize import pillow_bicubic
from diffusion.pretrained import folders

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = {384: "s", 768: "b", 1024: "l", 1280: "h", 1664: "bigg"}
PREPARATION = "preprocessor_config.json"


def clip(model: str) -> Network:
    """Both towers of CLIP from transformers' folder of a ``CLIPModel``, or an id on the hub.

    Its outputs are "features" [B, P], the projected embedding of a picture, and "text" [B, P], that
    of its caption, both of unit norm. Captions need the tokenizer's files in the folder. Pictures
    are resized as CLIPImageProcessor does: the shortest side by PIL's bicubic, rounded, then the
    middle is cut out. The network's name has width, patch and size, such as "clip_vitl14_336";
    that of OpenAI's 224 pixels has no size.

    Args:
      model: a folder with config.json and ``.safetensors``, or an id, which is fetched.
    """
    opening, files = opened(model, "CLIPModel")
    net, folder = opening.module, Path(opening.source)
    vision, size = net.vision, net.vision.size
    mean, std = _mean_and_std(folder)

    def open_weights() -> Run:
        params = opening.load()

        @exact
        def see(params: Any, x: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32) / 255
            x = (x - jnp.array(mean)[None, None, None]) / jnp.array(std)[None, None, None]
            return _unit(net.apply({"params": params}, x, method="see"))

        @exact
        def read(params: Any, ids: jax.Array) -> jax.Array:
            return _unit(net.apply({"params": params}, ids, method="read"))

        known: dict[str, Any] = {}

        def embed(subjects: Sequence[Any]) -> jax.Array:
            if "encode" not in known:
                known["encode"] = tokens("clip", folder, net.text.length)
            return read(params, known["encode"](subjects)[0])

        def run(x: np.ndarray, subjects: Sequence[Any]) -> Lazy:
            return Lazy(
                features=lambda: see(params, cropped(x, size)), text=lambda: embed(subjects)
            )

        return run

    kind = SIZES.get(vision.width, str(vision.width))
    name = f"clip_vit{kind}{vision.patch}" + ("" if size == 224 else f"_{size}")
    about = f"PIL bicubic, shortest side to {size}, rounded; the middle {size} x {size}"
    return Network(name, open_weights, ("features", "text"), files, about, batch=32)


def cropped(x: np.ndarray, size: int) -> np.ndarray:
    """The middle size x size of pictures [B, H, W, 3] whose shortest side is resized to size."""
    height, width = x.shape[1:3]
    short = min(height, width)
    x = pillow_bicubic(x, (size * height // short, size * width // short))
    top, left = (x.shape[1] - size) // 2, (x.shape[2] - size) // 2
    return x[:, top : top + size, left : left + size]


def _mean_and_std(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Those of the folder, or else OpenAI's."""
    if not (folder / PREPARATION).is_file():
        return MEAN, STD
    given = folders.read_json(folder / PREPARATION)
    return tuple(given.get("image_mean", MEAN)), tuple(given.get("image_std", STD))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
