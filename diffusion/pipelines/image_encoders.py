"""From pictures to the features that an IP-Adapter makes its tokens of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion import specs
from diffusion.evaluation import networks
from diffusion.evaluation.networks.clip import MEAN, STD, cropped
from diffusion.pipelines import judges
from diffusion.pipelines.from_run import is_run
from diffusion.pretrained import models

KNOWN = {**networks.CHOICES, "classifier": judges.classifier}
CLIP = "CLIPVisionModelWithProjection"


Encode = Callable[[Sequence[np.ndarray]], tuple[jax.Array, jax.Array]]
"""uint8 pictures [H, W, 1 or 3] -> (features [I, ...], those of no picture [1, ...])."""


@dataclass(frozen=True)
class ImageEncoder:
    """An image encoder whose weights have not been read.

    Attributes:
      name: for messages.
      width: D of its features, or None where only its weights tell.
      own_size: whether it resizes pictures itself; else they must be as large as in training.
      open: reads the weights and gives the function.
    """

    name: str
    width: int | None
    own_size: bool
    open: Callable[[], Encode]


def open_encoder(given: str, patches: bool = False) -> ImageEncoder:
    """The encoder that a text names.

    Args:
      given: transformers' folder of a ``CLIPVisionModelWithProjection`` or its id on the hub; a
        feature network, such as 'dinov2("FOLDER")'; or the workdir of a trained classifier.
      patches: whether the features are CLIP's last hidden layer but one, [N, D] of a picture, and
        not its embedding [D].

    Raises:
      FileNotFoundError, ValueError: there is no such encoder, or it does not know patches.
    """
    name = given.split("(")[0].strip()
    if name in KNOWN or is_run(given):
        if patches:
            raise ValueError(
                f"encoder={given!r} gives one embedding of a picture; this adapter takes the "
                f"patches of a {CLIP}"
            )
        made = specs.value(given, KNOWN, "encoder") if name in KNOWN else judges.classifier(given)

        def of_network(pictures: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
            found = made(np.stack(pictures), [None] * len(pictures))["features"]
            features = jnp.asarray(found, jnp.float32)
            return features, jnp.zeros_like(features[:1])

        return ImageEncoder(given, None, False, lambda: of_network)
    opening = models.open_model(given, expected=CLIP)
    net = opening.module

    def open_clip() -> Encode:
        params = opening.load()

        def of_clip(pictures: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
            x = np.concatenate([cropped(_coloured(picture), net.size) for picture in pictures])
            x = (x / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
            features = _seen(net, patches, params, x)
            none = jnp.zeros_like(features[:1])
            if patches:  # no picture is zeros, normalised already, as Plus was trained
                none = _seen(net, patches, params, np.zeros_like(x[:1]))
            return features, none

        return of_clip

    return ImageEncoder(given, net.width if patches else net.projection, True, open_clip)


def read_embeddings(path: str, feature: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The features of pictures [I, ...], and of no picture [1 or I, ...], of a ``.npy`` file.

    Args:
      path: of an array [D], [images, D] or [2, images, D], the last with those of no picture first,
        which else are zeros; of patches [2, images, N, D].
      feature: (D,) of embeddings, (0, D) of patches.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        given = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array that NumPy reads without unpickling") from error
    wide, patches = feature[-1], len(feature) == 2
    what = f"[2, images, patches, {wide}], those of no picture first"
    what = what if patches else f"[{wide}], [images, {wide}] or [2, images, {wide}]"
    ranks = (4,) if patches else (1, 2, 3)
    shape = getattr(given, "shape", ())
    fits = len(shape) in ranks and shape[-1] == wide and 0 not in shape
    if not fits or (len(shape) == ranks[-1] and shape[0] != 2) or given.dtype.kind != "f":
        about = f"{given.dtype} {shape}" if shape else "no single array"
        raise ValueError(f"{path} holds {about}; expected floats {what}")
    given = np.asarray(given, np.float32)
    if not np.isfinite(given).all():
        raise ValueError(f"{path} contains NaN or infinity")
    if len(shape) == ranks[-1]:
        return given[1], given[0]
    given = given.reshape(-1, wide)
    return given, np.zeros_like(given[:1])


@partial(jax.jit, static_argnums=(0, 1))
def _seen(net: nn.Module, patches: bool, params: Any, x: jax.Array) -> jax.Array:
    """CLIP's features of normalised pictures [I, S, S, 3]."""
    encoded = net.apply({"params": params}, x)
    return encoded.hidden[-2] if patches else encoded.projected


def _coloured(picture: np.ndarray) -> np.ndarray:
    """uint8 [1, H, W, 3], of a grey picture as well."""
    return np.broadcast_to(picture, (*picture.shape[:2], 3))[None]
