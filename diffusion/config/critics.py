"""From a method's ``features`` to the network that critics of few-step students look at."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion.conditioning import Conditioning
from diffusion.config.alignment import IMAGENET_NORMAL
from diffusion.evaluation.networks.folder import opened
from diffusion.levels import Array, NoiseLevel
from diffusion.models.dinov2 import DinoV2
from diffusion.models.surroundings import image_network
from diffusion.objectives.few_steps.critics import FEATURES, Extract, Features, Inner
from diffusion.objectives.few_steps.student import TEACHER, Student
from diffusion.pipelines import companions, description
from diffusion.pipelines.from_run import open_run
from diffusion.pipelines.pipeline import Pipeline

SEVERAL = 4  # layers of DINOv2 by default


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Layers of DINOv2, whose tokens are those of pictures in [-1, 1]; one channel stands for all.

    Attributes:
      size: (height, width) in pixels that it sees.
    """

    module: DinoV2
    layers: tuple[int, ...]
    size: tuple[int, int]

    def __call__(
        self, params: Any, x: Array, level: NoiseLevel, cond: Conditioning
    ) -> tuple[Array, ...]:
        """See ``Extract``; it takes x [B, H, W, C] to be clean."""
        x = jax.image.resize((x + 1) / 2, (len(x), *self.size, x.shape[-1]), "cubic")
        x = jnp.broadcast_to(x, (*x.shape[:3], self.module.channels))
        mean, std = (jnp.array(each) for each in IMAGENET_NORMAL)
        return self.module.apply({"params": params}, (x - mean) / std, self.layers)[1]


def attach(
    config: ConfigDict, student: Student, pipeline: Pipeline, frozen: dict[str, Any], base: Any
) -> tuple[Student, dict[str, Any]]:
    """The student with the features that its method judges, and its frozen parameters with theirs.

    Args:
      base: the frozen parameters beside an adapter, which are the teacher's if it has no other.

    Raises:
      ValueError: there is no such network, or none of its layers can be judged.
    """
    wanted = getattr(student.method, "features", None)
    if wanted is not None:
        student, frozen = _with_features(config, student, pipeline, frozen, wanted)
    known = frozen if base is None else {TEACHER: {"network": base}} | frozen
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), known)
    return dataclasses.replace(student, frozen=shapes), frozen


def _with_features(
    config: ConfigDict,
    student: Student,
    pipeline: Pipeline,
    frozen: dict[str, Any],
    wanted: Features,
) -> tuple[Student, dict[str, Any]]:
    path, extract = wanted.path, None
    if wanted.kind == "dinov2":
        extract, params = _dinov2(config, pipeline, wanted)
        return dataclasses.replace(student, extract=extract), frozen | {FEATURES: params}
    if wanted.kind == "classifier":
        found, _ = companions.classifier(path, pipeline, config.objective.schedule)
        judge = description.classification(open_run(path).description)
        extract = _inner(judge, found.network.schedule, wanted, blind=True)
        return dataclasses.replace(student, extract=extract), frozen | {FEATURES: found.params}
    if TEACHER not in frozen:
        return dataclasses.replace(student, extract=_inner(student, None, wanted)), frozen
    run = open_run(config.few_steps.teacher)
    same = run.description.schedule == config.objective.schedule
    other = run.pipeline
    extract = _inner(other, None if same else other.schedule, wanted)
    return dataclasses.replace(student, extract=extract), frozen


def _inner(model: Any, schedule: Any, wanted: Features, blind: bool = False) -> Extract:
    """Blocks of what has network, prediction and c_noise."""
    inside: nn.Module = image_network(model.network)
    if not hasattr(inside, "feature_blocks"):
        raise ValueError(
            f"features of a {type(inside).__name__}: it does not give its blocks' outputs; "
            "a unet, dit or mlp does"
        )
    last, middle = inside.feature_blocks
    usual = (middle,) if wanted.kind == "middle" else tuple(range(1, last + 1))
    layers = _layers(wanted, usual, last)
    return Inner(model.network, model.prediction, model.c_noise, schedule, layers, blind)


def _layers(wanted: Features, usual: tuple[int, ...], last: int) -> tuple[int, ...]:
    if any(not 1 <= layer <= last for layer in wanted.layers):
        raise ValueError(f"layers={wanted.layers}: the {wanted.kind} network has 1..{last}")
    return wanted.layers or usual


def _dinov2(config: ConfigDict, pipeline: Pipeline, wanted: Features) -> tuple[Extract, Any]:
    if len(pipeline.shape) != 3 or config.data.autoencoder:
        raise ValueError(
            "dinov2 sees pictures, and this model makes "
            + ("latents" if config.data.autoencoder else f"examples of shape {pipeline.shape}")
            + "; features=teacher() judges those"
        )
    model, _ = opened(wanted.path, "Dinov2Model")
    net: DinoV2 = model.module
    if pipeline.shape[-1] not in (1, net.channels):
        raise ValueError(
            f"dinov2 takes {net.channels} channels, and pictures have {pipeline.shape[-1]}"
        )
    if wanted.size < net.patch or wanted.size % net.patch:
        nearest = max(round(wanted.size / net.patch), 1) * net.patch
        raise ValueError(
            f"dinov2(size={wanted.size}) must be a multiple of {net.patch}; nearest: {nearest}"
        )
    step = max(net.depth // SEVERAL, 1)
    usual = tuple(range(net.depth, 0, -step))[:SEVERAL][::-1]
    layers = _layers(wanted, usual, net.depth)
    return Pictures(net, layers, (wanted.size,) * 2), model.load()
