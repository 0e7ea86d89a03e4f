"""The term ``alignment``: from its spec to the encoder that inner tokens are aligned with.

Only training needs the encoder: samples are drawn without.
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
class Setting:
    """What a term may need besides its options.

    Attributes:
      config: the whole config.
      objective: what the term decorates.
      train: the training data.
      load: another run's config -> its objective, number of classes and data shape.
    """

    config: ConfigDict
    objective: Denoising
    train: Source
    load: Callable


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


def make(
    *,
    encoder: str,
    block: int = 0,
    weight: float = 0.5,
    stop: int = 0,
    hidden: int = 2048,
    setting: Setting,
) -> tuple[Alignment, Source, Any]:
    """The term, the data with the images that it needs, and the encoder's weights.

    Args:
      encoder: folder of transformers' DINOv2 or CLIP vision model, here or on the hub, or the
        workdir of a classifier.
      block: whose tokens, counted from 1: a dit's blocks; a unet's levels going down, then its mid
        block. 0: a third of a dit's blocks, the mid block.
      weight: of the loss.
      stop: steps after which it ends; 0: it stays.
      hidden: width of the projector, which is trained too.
      setting: what the config describes besides.

    Raises:
      ValueError: the encoder, the block or the data do not fit.
    """
    if not isinstance(encoder, str) or not encoder:
        raise ValueError(f"encoder={encoder!r} must name a folder or a classifier's workdir")
    for name, value, least in (("weight", weight, 0), ("stop", stop, 0), ("hidden", hidden, 1)):
        if not least <= value < 2**31:
            raise ValueError(f"{name}={value} must be a finite number >= {least}")
    block = _block(block, setting.objective.network)
    train, shape = _with_images(setting.config, setting.train)
    features_of, params = _encoder(encoder, setting, shape)
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    features = jax.eval_shape(lambda p, x: features_of(p, x, (1, 1)), params, example)
    projector = Projector(features.shape[-1], hidden)
    return Alignment(features_of, projector, block, weight, stop or None), train, params


def _block(number: int, network: nn.Module) -> int:
    network = network.image if isinstance(network, TextToImage) else network
    if isinstance(network, DiT):
        last, usual = network.depth, max(network.depth // 3, 1)
    elif isinstance(network, UNet):
        last = usual = len(network.widths) + 1
    else:
        raise ValueError("alignment is of the tokens of a unet or dit")
    if not 0 <= number <= last:
        raise ValueError(f"block={number}: this network has the blocks 1..{last}; 0 chooses one")
    return number or usual


def _with_images(config: ConfigDict, train: Source) -> tuple[Source, tuple[int, ...]]:
    """The data, of latents with their images beside them, and the images' shape."""
    c = config.data
    if not c.autoencoder:
        if len(train.shape) != 3 or c.name == "latents":
            raise ValueError(f"the encoder sees images, and config.data.name={c.name!r} has none")
        return train, train.shape
    if train.buckets:
        raise ValueError(
            f"images are read beside latents of one shape only, not of config.data.buckets="
            f"{c.buckets!r}"
        )
    images = make_images(c, "train")
    return dataclasses.replace(train, read=partial(_both, train.read, images.read)), images.shape


def _both(read: Callable, images: Callable, index: np.ndarray) -> Batch:
    return read(index) | {"clean": images(index)["x"]}


def _encoder(path: str, setting: Setting, shape: tuple[int, ...]) -> tuple[Encoder, Any]:
    if workdirs.steps(path):
        others = setting.config, Classification, 0, shape, setting.load
        run = reference_runs.opened(path, "encoder", *others)
        return Middle(run.objective), run.params()
    folder = latents.located(path, "encoder")
    module = pretrained.open_model(folder, with_weights=False).module
    if not isinstance(module, (ClipVision, DinoV2)):
        raise ValueError(
            f"encoder={path!r}: a {type(module).__name__} is no encoder of images; expected a "
            "folder of Dinov2Model or CLIPVisionModelWithProjection, or the workdir of a "
            "classifier (configs/digits_classifier.py)"
        )
    if shape[-1] not in (1, module.channels):
        raise ValueError(
            f"encoder={path!r} takes {module.channels} channels, and images have {shape[-1]}"
        )
    mean, std = IMAGENET_NORMAL if isinstance(module, DinoV2) else CLIP_NORMAL
    file = Path(folder) / PREPROCESSOR
    if file.exists():
        fields = json.loads(file.read_text())
        mean = tuple(fields.get("image_mean", mean))
        std = tuple(fields.get("image_std", std))
    params = pretrained.load(folder).params
    return Patches(module.clone(dtype=jnp.dtype(setting.config.model.dtype)), mean, std), params
