"""From a config to a model: data, network, objective."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion import specs
from diffusion.config import autoencoder, pretrained_network
from diffusion.config import objective as objectives
from diffusion.config.data import make_source
from diffusion.config.errors import field, wrong_types
from diffusion.data.sources import Source
from diffusion.models.clip import ClipText
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.noisy_classifier import NoisyClassifier
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.objectives.objective import Objective

MODELS = {"unet": UNet, "dit": DiT, "mlp": MLP}
OBJECTIVES = ("denoising", "consistency", "classification", "autoencoding")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_model(config: ConfigDict, train: Source) -> tuple[Objective, int]:
    """The objective, with its network, and the number of classes."""
    name, classes = config.objective.get("name", "denoising"), train.num_classes
    if name not in OBJECTIVES:
        raise specs.unknown("config.objective.name", name, OBJECTIVES)
    if name == "autoencoding":
        return autoencoder.make(config, train.shape, _dtype(config)), 0
    if name != "classification":
        conditional = config.objective.conditional
        classes = classes if conditional else 0
        network = _network(config, classes, train.shape)
        nulls = {"label": classes} if classes else {}
        if conditional and train.encode is not None:
            nulls |= {name: value[0] for name, value in train.encode([""]).items()}
        if conditional and train.vocabulary:
            network = TextToImage(text=_text_encoder(config, train.vocabulary), image=network)
        return objectives.denoising(config, network, nulls, train.shape), classes
    if not classes:
        raise ValueError(
            f"config.objective.name='classification' needs labels, which config.data.name="
            f"{config.data.name!r} does not have"
        )
    network = _classifier(config, classes, train.shape)
    return objectives.classification(config, network), classes


def other_run(config: ConfigDict) -> tuple[Objective, int, tuple[int, ...]]:
    """Another run's objective, number of classes and data shape."""
    train = make_source(config.data, "train")
    return *make_model(config, train), train.shape


def _network(config: ConfigDict, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    c = config.model
    if pretrained_network.wanted(config):
        return pretrained_network.network(config, _dtype(config))
    if c.name not in MODELS:
        raise specs.unknown("config.model.name", c.name, (*MODELS, pretrained_network.NAME))
    if (c.name == "mlp") != (len(shape) == 1):
        kind = "points" if len(shape) == 1 else "images"
        raise ValueError(
            f"config.model.name={c.name!r} does not take {kind} (config.data.name="
            f"{config.data.name!r}); choose {'mlp' if kind == 'points' else 'unet or dit'}"
        )
    options = dict(c[c.name], dtype=_dtype(config))
    learned = objectives.learns_variance(config)
    with field(f"config.model.{c.name}"), wrong_types():
        if c.name == "unet":
            network = UNet(
                **options,
                num_classes=num_classes or None,
                out_channels=shape[-1] * (2 if learned else 1),
            )
            network.check(shape[:2])
            return network
        if c.name == "dit":
            return DiT(**options, num_classes=num_classes, learned_variance=learned)
        if learned:
            raise ValueError(
                "config.objective.terms: variational_bound needs a network of images, unet or dit"
            )
        return MLP(**options, num_classes=num_classes or None)


def _text_encoder(config: ConfigDict, vocabulary: int) -> nn.Module:
    c = config.model.text
    if min(c.width, c.depth, c.heads) < 1 or c.width % c.heads:
        raise ValueError(
            f"config.model.text: width={c.width}, depth={c.depth}, heads={c.heads}; expected "
            "positive numbers and heads that divide the width"
        )
    with field("config.model.text"):
        return ClipText(
            vocab_size=vocabulary,
            width=c.width,
            depth=c.depth,
            heads=c.heads,
            hidden=4 * c.width,
            length=config.data.tokens,
            dtype=_dtype(config),
        )


def _classifier(config: ConfigDict, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    c = config.model
    if c.name != "unet" or len(shape) != 3:
        raise ValueError(
            f"config.model.name={c.name!r}: a classifier is the encoder of a unet, on images; "
            "choose config.model.name=unet"
        )
    with field("config.model.unet"), wrong_types():
        options = {k: v for k, v in c.unet.items() if k != "up_attention"}  # it has no up blocks
        network = NoisyClassifier(**options, dtype=_dtype(config), classes=num_classes)
        network.check(shape[:2])
        return network


def _dtype(config: ConfigDict) -> Any:
    name = config.model.dtype
    if name not in DTYPES:
        raise specs.unknown("config.model.dtype", name, DTYPES)
    return DTYPES[name]
