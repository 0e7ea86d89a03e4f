"""From ``config.alignment`` to the encoder that inner tokens are aligned with in training.

``config.alignment.encoder`` names a folder of transformers' DINOv2 or CLIP vision model, here or on
the hub, or the workdir of a classifier. Only training needs it: samples are drawn without.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import pretrained
from diffusion.config import latents, reference_runs
from diffusion.config.data import make_images
from diffusion.errors import field
from diffusion.config.model import DTYPES, other_run
from diffusion.data.sources import Batch, Source
from diffusion.levels import Array
from diffusion.models.clip import ClipVision
from diffusion.models.dinov2 import DinoV2
from diffusion.models.dit import DiT
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.terms.alignment import Alignment, Encoder, Projector
from diffusion.runs import workdir as workdirs

PREPROCESSOR = "preprocessor_config.json"
CLIP_NORMAL = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_NORMAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patches' features after a vision transformer's last layer.

    Attributes:
      module: a ``DinoV2`` sees images at the size that gives it a patch per token of the denoiser,
        a ``ClipVision`` at its own; one channel stands for all.
      mean, std: of the channels of what it sees, images in [0, 1].
    """

    module: ClipVision | DinoV2
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, params: Any, images: Array, grid: tuple[int, int]) -> Array:
        """[B, h, w, D] of images [B, H, W, C]; see ``objectives.terms.alignment.Encoder``."""
        net = self.module
        if isinstance(net, ClipVision):
            grid = (net.size // net.patch,) * 2
        shape = (len(images), *(n * net.patch for n in grid), images.shape[-1])
        x = jax.image.resize((images + 1) / 2, shape, "cubic")
        x = jnp.broadcast_to(x, (*shape[:3], net.channels))
        out = net.apply({"params": params}, (x - jnp.array(self.mean)) / jnp.array(self.std))
        tokens = out.last if isinstance(net, ClipVision) else out
        return tokens[:, 1:].reshape(len(images), *grid, net.width)


@dataclasses.dataclass(frozen=True)
class Middle:
    """The features in the middle of a classifier of noised images, of clean ones."""

    objective: Classification

    def __call__(self, params: Any, images: Array, grid: tuple[int, int]) -> Array:
        """[B, h, w, D] of images [B, H, W, C], whatever the grid."""
        del grid
        return self.objective.features(params, images)


def wanted(config: ConfigDict) -> bool:
    """Whether the config aligns anything."""
    return bool(config.alignment.encoder)


def without(config: ConfigDict) -> ConfigDict:
    """The config of the same model, for whatever is not training."""
    config = config.copy_and_resolve_references()
    config.alignment.encoder = ""
    return config


def attach(
    config: ConfigDict, objective: Any, train: Source
) -> tuple[Denoising, Source, dict[str, Any]]:
    """The objective with its alignment, the data with the images that it needs, and the weights.

    Raises:
      ValueError: the encoder, the block or the data do not fit; the message names the field.
    """
    c, name = config.alignment, "config.alignment"
    if not isinstance(objective, Denoising):
        raise ValueError(
            f"{name}.encoder={c.encoder!r} is for config.objective.name='denoising', not "
            f"{config.objective.name!r}"
        )
    block = _block(c.block, objective.network)
    train, shape = _with_images(config, train)
    encoder, params = _encoder(config, shape)
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with field(f"{name}.encoder={c.encoder!r}"):
        features = jax.eval_shape(lambda p, x: encoder(p, x, (1, 1)), params, example)
    alignment = Alignment(
        encoder=encoder,
        projector=Projector(features.shape[-1], c.hidden),
        block=block,
        weight=c.weight,
        stop=c.stop or None,
    )
    return dataclasses.replace(objective, alignment=alignment), train, {"encoder": params}


def _block(number: int, network: nn.Module) -> int:
    network = network.image if isinstance(network, TextToImage) else network
    if isinstance(network, DiT):
        last, usual = network.depth, max(network.depth // 3, 1)
    elif isinstance(network, UNet):
        last = usual = len(network.widths) + 1
    else:
        raise ValueError("config.alignment.encoder aligns tokens of a unet or dit")
    if number > last:
        raise ValueError(f"config.alignment.block={number}: this network has 1..{last}, or 0")
    return number or usual


def _with_images(config: ConfigDict, train: Source) -> tuple[Source, tuple[int, ...]]:
    """The data, of latents with their images beside them, and the images' shape."""
    c = config.data
    if not c.autoencoder:
        if len(train.shape) != 3 or c.name == "latents":
            raise ValueError(
                f"config.alignment.encoder sees images, and config.data.name={c.name!r} has none"
            )
        return train, train.shape
    if train.buckets:
        raise ValueError(
            f"config.alignment.encoder with latents of config.data.buckets={c.buckets!r}: images "
            "are read beside latents of one shape only"
        )
    images = make_images(c, "train")
    return dataclasses.replace(train, read=partial(_both, train.read, images.read)), images.shape


def _both(read: Callable, images: Callable, index: np.ndarray) -> Batch:
    return read(index) | {"clean": images(index)["x"]}


def _encoder(config: ConfigDict, shape: tuple[int, ...]) -> tuple[Encoder, Any]:
    path, name = config.alignment.encoder, "config.alignment.encoder"
    if workdirs.steps(path):
        run = reference_runs.opened(path, name, config, Classification, 0, shape, other_run)
        return Middle(run.objective), run.params()
    folder = latents.located(path, name)
    with field(f"{name}={path!r}"):
        module = pretrained.open_model(folder, with_weights=False).module
        if not isinstance(module, (ClipVision, DinoV2)):
            raise ValueError(
                f"a {type(module).__name__} is no encoder of images; expected a folder of "
                "Dinov2Model or CLIPVisionModelWithProjection, or the workdir of a classifier "
                "(configs/digits_classifier.py)"
            )
        if shape[-1] not in (1, module.channels):
            raise ValueError(f"it takes {module.channels} channels, and images have {shape[-1]}")
        mean, std = IMAGENET_NORMAL if isinstance(module, DinoV2) else CLIP_NORMAL
        file = Path(folder) / PREPROCESSOR
        if file.exists():
            fields = json.loads(file.read_text())
            mean = tuple(fields.get("image_mean", mean))
            std = tuple(fields.get("image_std", std))
        params = pretrained.load(folder).params
    return Patches(module.clone(dtype=DTYPES[config.model.dtype]), mean, std), params
