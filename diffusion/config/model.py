"""From a config and its data to the description of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion import specs
from diffusion.config import few_steps, pretrained_network
from diffusion.config.objective import drops_text, learns_variance
from diffusion.data.sources import Source
from diffusion.errors import field, wrong_types
from diffusion.pipelines import description
from diffusion.pipelines.conditioners import Captions
from diffusion.pipelines.description import DTYPES, Description
from diffusion.pipelines.pipeline import DEFAULTS, Defaults, Pipeline

OBJECTIVES = ("denoising", "few_steps", "classification", "autoencoding")
AT = "config.objective."
SHOWN = 10
"""Held-out captions that are drawn where none are given."""


def describe(config: ConfigDict, train: Source, held_out: Source) -> Description:
    """What the config's model is, on these data.

    Raises:
      ValueError: a field has an impossible value, or two do not fit; the message names them.
    """
    c, name = config.objective, config.objective.name
    if name not in OBJECTIVES:
        raise specs.unknown(f"{AT}name", name, OBJECTIVES)
    labelled = name == "classification" or (name != "autoencoding" and c.conditional)
    classes = train.num_classes if labelled else 0
    if name == "classification" and not classes:
        raise ValueError(
            f"{AT}name='classification' needs labels, which config.data.name="
            f"{config.data.name!r} does not have"
        )
    network = _network(config, train)
    captioned = labelled and train.encode is not None
    fields = dict(config.model.get(config.model.name, {}))
    if network == "classifier":
        fields.pop("up_attention")  # it has no up blocks
    if network == "pretrained":
        fields = {"path": config.model.path, "remat": config.model.remat}
    if captioned and train.vocabulary:
        _check_text_encoder(config)
    return Description(
        network=network,
        fields=fields,
        schedule=c.schedule,
        prediction=c.prediction,
        c_noise=c.c_noise,
        shape=tuple(train.shape),
        dtype=dtype(config),
        sigma_data=config.data.std,
        learned_variance=learns_variance(config),
        two_times=getattr(few_steps.method(config), "two_times", False),
        view=train.view,
        num_classes=classes,
        class_names=train.class_names if classes else (),
        null=drops_text(config),
        tokenizer=config.data.tokenizer if captioned else "",
        tokens=config.data.tokens if captioned else 0,
        vocabulary=train.vocabulary if captioned else (),
        text=config.model.text.to_dict() if captioned and train.vocabulary else {},
        text_encoder=config.data.text_encoder if captioned else "",
        autoencoder=config.data.autoencoder,
        captions=shown(held_out) if captioned else (),
        edits=name == "denoising" and "image" in train[0],
        sampler=_sampler(config),
    )


def shown(held_out: Source) -> tuple[str, ...]:
    """Some of the captions that are held out."""
    different = list(dict.fromkeys(held_out.captions))
    chosen = np.linspace(0, len(different) - 1, min(SHOWN, len(different))).astype(int)
    return tuple(different[i] for i in chosen)


def pipeline(config: ConfigDict, d: Description, train: Source) -> Pipeline:
    """The pipeline of a description, whose captions the data can encode already.

    Raises:
      ValueError: the network does not fit the data; the message names its field.
    """
    known = Captions(train.encode, d.captions, d.null) if d.tokenizer else None
    if d.network == "pretrained":
        pretrained_network.check_path(config)
    with field(f"config.model.{config.model.name}"), wrong_types():
        return description.pipeline(d, known, AT)


def _sampler(config: ConfigDict) -> Defaults:
    """The defaults of config.sampler; the project's own where a field is left open."""
    c, usual = config.sampler, DEFAULTS
    return Defaults(
        usual.solver if c.solver == "auto" else c.solver,
        usual.grid if c.grid == "auto" else c.grid,
        c.steps or usual.steps,
        usual.guidance if c.guidance == "auto" else tuple(specs.texts(c.guidance)),
    )


def dtype(config: ConfigDict) -> str:
    """The name of the computation's dtype."""
    if config.model.dtype == "auto":
        return "float32"
    if config.model.dtype not in DTYPES:
        raise specs.unknown("config.model.dtype", config.model.dtype, ("auto", *DTYPES))
    return config.model.dtype


def _network(config: ConfigDict, train: Source) -> str:
    """The description's name for the network, checked against objective and data."""
    name, objective, at = config.model.name, config.objective.name, "config.model.name"
    images = train.view == "images"
    if objective == "autoencoding":
        if name != "autoencoder":
            raise ValueError(f"{at}={name!r}: {AT}name='autoencoding' trains an autoencoder")
        if not images or train.shape[0] != train.shape[1]:
            raise ValueError(
                f"config.data.name={config.data.name!r}: an autoencoder is trained on square "
                f"images, these have shape {train.shape}"
            )
        return name
    if objective == "classification":
        if name != "unet" or not images:
            raise ValueError(
                f"{at}={name!r}: a classifier is the encoder of a unet, on images; choose unet"
            )
        return "classifier"
    if name not in description.DENOISERS:
        raise specs.unknown(at, name, description.DENOISERS)
    if (name == "mlp") == images:
        kind = "images" if images else train.view
        raise ValueError(
            f"{at}={name!r} does not take {kind} (config.data.name={config.data.name!r}); choose "
            f"{'unet or dit' if images else 'mlp'}"
        )
    if name == "mlp" and learns_variance(config):
        raise ValueError(
            "config.objective.terms: variational_bound needs a network of images, unet or dit"
        )
    return name


def _check_text_encoder(config: ConfigDict) -> None:
    c: Any = config.model.text
    if min(c.width, c.depth, c.heads) < 1 or c.width % c.heads:
        raise ValueError(
            f"config.model.text: width={c.width}, depth={c.depth}, heads={c.heads}; expected "
            "positive numbers and heads that divide the width"
        )
