"""From a config to a model: data, network, objective."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion import denoiser, predictions, schedules, specs
from diffusion.conditioning import null_like
from diffusion.config import autoencoder, pretrained_network
from diffusion.config.data import make_source
from diffusion.config.errors import field, wrong_types
from diffusion.data.sources import Source
from diffusion.models.clip import ClipText
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.noisy_classifier import NoisyClassifier
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.objectives import couplings, distances, times, weightings
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising, Uncertainty
from diffusion.objectives.kl_autoencoder import Autoencoding
from diffusion.objectives.terms.variance import VariationalBound

MODELS = {"unet": UNet, "dit": DiT, "mlp": MLP}
OBJECTIVES = ("denoising", "classification", "autoencoding")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


Objective = Denoising | Classification | Autoencoding


def make_model(config: ConfigDict, train: Source) -> tuple[Objective, int]:
    """The objective, with its network, and the number of classes."""
    name, classes = config.objective.get("name", "denoising"), train.num_classes
    if name not in OBJECTIVES:
        raise specs.unknown("config.objective.name", name, OBJECTIVES)
    if name == "autoencoding":
        return autoencoder.make(config, train.shape, _dtype(config)), 0
    if name == "denoising":
        conditional = config.objective.conditional
        classes = classes if conditional else 0
        network = _network(config, classes, train.shape)
        nulls = {"label": classes} if classes else {}
        if conditional and train.encode is not None:
            nulls |= {name: value[0] for name, value in train.encode([""]).items()}
        if conditional and train.vocabulary:
            network = TextToImage(text=_text_encoder(config, train.vocabulary), image=network)
        return _objective(config, network, nulls, train), classes
    if not classes:
        raise ValueError(
            f"config.objective.name='classification' needs labels, which config.data.name="
            f"{config.data.name!r} does not have"
        )
    return _classification(config, _classifier(config, classes, train.shape)), classes


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
    learned = config.objective.learned_variance
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
            raise ValueError("config.objective.learned_variance=True needs a unet or dit")
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


def _schedule(text: str) -> schedules.Schedule:
    with field(f"config.objective.schedule={text!r}"), wrong_types():
        return specs.value(text, schedules.CHOICES, "config.objective.schedule")


def _shared(config: ConfigDict, schedule: schedules.Schedule) -> dict[str, Any]:
    """What both objectives have: input scaling, what the network is told, which levels."""
    c, at = config.objective, "config.objective"
    context = {"sigma_data": config.data.std, "schedule": schedule}
    steps = {"steps": schedule.steps} if isinstance(schedule, schedules.Table) else {}
    if not c.t_min < schedule.t_max:
        raise ValueError(f"{at}.t_min={c.t_min} must lie below the schedule's end {schedule.t_max}")
    return {
        "schedule": schedule,
        "prediction": specs.function(
            c.prediction, predictions.CHOICES, f"{at}.prediction", context
        ),
        "c_noise": _c_noise(c.c_noise, schedule),
        "times": specs.function(c.times, times.CHOICES, f"{at}.times", steps),
        "stratify": config.train.batch_size if c.stratified else None,
        "t_min": c.t_min,
    }


def _classification(config: ConfigDict, network: nn.Module) -> Classification:
    return Classification(network=network, **_shared(config, _schedule(config.objective.schedule)))


def _objective(
    config: ConfigDict, network: nn.Module, nulls: dict[str, Any], train: Source
) -> Denoising:
    c, at = config.objective, "config.objective"
    schedule = _schedule(c.schedule)
    context = {"sigma_data": config.data.std, "schedule": schedule}
    bound = None
    if c.learned_variance:
        if not isinstance(schedule, schedules.Table) or not c.times.startswith("discrete"):
            raise ValueError(
                f"{at}.learned_variance=True bounds a chain of discrete steps: it needs a table "
                f"schedule (linear, scaled_linear, cosine, sigmoid) and times='discrete', got "
                f"schedule={c.schedule!r}, times={c.times!r}"
            )
        bound = VariationalBound(schedule.steps, c.vlb_weight, train.levels or 256)
    return Denoising(
        network=network,
        **_shared(config, schedule),
        weighting=specs.function(c.weighting, weightings.CHOICES, f"{at}.weighting", context),
        distance=specs.function(c.distance, distances.CHOICES, f"{at}.distance"),
        coupling=_coupling(config, bool(nulls.get("label")), train.shape),
        null=partial(null_like, **nulls),
        dropout=c.label_dropout if nulls else 0.0,
        noise_offset=c.noise_offset,
        input_perturbation=c.input_perturbation,
        bound=bound,
        uncertainty=Uncertainty() if c.uncertainty else None,
    )


def _coupling(config: ConfigDict, labels: bool, shape: tuple[int, ...]) -> couplings.Coupling:
    """That of config.objective, by default within what a device takes at once."""
    name, text = "config.objective.coupling", config.objective.coupling
    size = config.train.batch_size // (jax.device_count() * config.train.accumulate)
    coupling = specs.function(text, couplings.CHOICES, name, {"group": size})
    if coupling is not couplings.independent and config.objective.learned_variance:
        raise ValueError(
            f"{name}={text!r}: the bound of config.objective.learned_variance=True takes noise to "
            "be independent of the data"
        )
    x, label = (jax.ShapeDtypeStruct(s, d) for s, d in (((size, *shape), "f4"), ((size,), "i4")))
    with field(f"{name}={text!r}"):
        jax.eval_shape(lambda x, y: coupling(x, lambda _: x, y), x, label if labels else None)
    return coupling


def _c_noise(text: str, schedule: schedules.Schedule) -> Any:
    """How the network is told the time; "auto" is the custom of each schedule's models."""
    if text == "auto":
        if isinstance(schedule, schedules.Table):
            text = "ddpm_index"
        elif isinstance(schedule, (schedules.EDM, schedules.VE)):
            text = "log_sigma"
        else:
            text = "thousand_t"
    context = {"steps": schedule.steps} if isinstance(schedule, schedules.Table) else {}
    return specs.function(text, denoiser.C_NOISE, "config.objective.c_noise", context)
