"""From pictures to the features that an IP-Adapter makes its tokens of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class ImageEncoder:
    """An image encoder whose weights have not been read.

    Attributes:
      name: for messages.
      width: D of its features, or None where only its weights tell.
      own_size: whether it resizes pictures itself; else they must be as large as in training.
      encode: uint8 pictures [H, W, 3] -> (features [I, ...], those of no picture [1, ...]).
    """

    name: str
    width: int | None
    own_size: bool
    encode: Callable[[Sequence[np.ndarray]], tuple[jax.Array, jax.Array]]


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
            found = [made(picture[None], [None])["features"] for picture in pictures]
            features = jnp.asarray(np.concatenate(found), jnp.float32)
            return features, jnp.zeros_like(features[:1])

        return ImageEncoder(given, None, False, of_network)
    opening = models.open_model(given, expected=CLIP)
    net = opening.module

    def of_clip(pictures: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        params = opening.load()
        x = np.concatenate([cropped(picture[None], net.size) for picture in pictures])
        x = (x / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
        features = _seen(net, patches, params, x)
        if patches:  # no picture is zeros, as Plus was trained
            return features, _seen(net, patches, params, np.zeros_like(x[:1]))
        return features, jnp.zeros_like(features[:1])

    return ImageEncoder(given, net.width if patches else net.projection, True, of_clip)


@partial(jax.jit, static_argnums=(0, 1))
def _seen(net: nn.Module, patches: bool, params: Any, x: jax.Array) -> jax.Array:
    """CLIP's features of normalised pictures [I, S, S, 3]."""
    encoded = net.apply({"params": params}, x)
    return encoded.hidden[-2] if patches else encoded.projected
