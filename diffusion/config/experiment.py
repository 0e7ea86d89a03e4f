"""From a config to an experiment.

Whatever can be found wrong with a config is found here, before anything is compiled, and named by
its field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import ema, specs
from diffusion.config import (
    adaptation,
    autoencoder,
    drawing,
    initialization,
    judging,
    model,
    optimizer,
    pretrained_network,
    ranges,
    teachers,
    terms,
)
from diffusion.config import objective as objectives
from diffusion.config.data import augmentation, make_source
from diffusion.data import batches
from diffusion.data.sources import Source
from diffusion.errors import field, wrong_types
from diffusion.evaluation import merits
from diffusion.evaluation.convergence import deterministic
from diffusion.objectives import couplings
from diffusion.objectives.adapting import BASE
from diffusion.objectives.objective import Context, Objective
from diffusion.pipelines.description import Description
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.from_run import components
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.runs import averages, snapshots
from diffusion.specs import texts
from diffusion.training import optimizers, parallel

BUCKET = "bucket {} x {} of config.data.buckets"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes: data, model, objective, how to train, how to sample.

    Attributes:
      config: the config, resolved.
      train, held_out: the data.
      description: what the model is, for ``model.json``.
      pipeline: the model.
      objective: what is minimised.
      optimizer: the update.
      emas: averages of the parameters, by name.
      drawer: draws samples; None for a classifier or an autoencoder.
      frozen: parameters that the objective needs and that are not trained, or None.
      adaptation: the adapter that is trained and its model, or None.
      notes: what a user should know about this combination.
    """

    config: ConfigDict
    train: Source
    held_out: Source
    description: Description
    pipeline: Pipeline
    objective: Objective
    optimizer: optimizers.Optimizer
    emas: dict[str, ema.Profile]
    drawer: Drawer | None = None
    frozen: Any = None
    adaptation: adaptation.Adaptation | None = None
    notes: tuple[str, ...] = ()

    def params(self, trained: Any) -> Params:
        """The pipeline's parameters, of what was trained."""
        if self.adaptation is not None:  # the base lies on one device
            trained = jax.device_put(trained, jax.local_devices()[0])
        return self.objective.network_params(trained, self.frozen) | self._components

    @cached_property
    def _components(self) -> dict[str, Any]:
        if self.adaptation is not None:
            return self.adaptation.others
        return components(self.description)


def build(config: ConfigDict) -> Experiment:
    """The experiment of a config.

    Raises:
      ValueError: a field has an impossible value, or two do not fit; the message names them.
    """
    ranges.check(config)
    if config.model.path and not pretrained_network.is_pretrained(config):
        raise ValueError(
            f"config.model.path={config.model.path!r} is drawn from, or trained further with "
            "config.model.name='pretrained'; a run's parameters are taken by config.train.init_from"
        )
    _check_layout(config)
    initialization.check(config)
    objectives.check(config)
    with field("config.sampler"):
        averages.check(config.sampler.average, config.sampler.checkpoint)
    made = adaptation.make(config)
    train, held_out = (make_source(config.data, split) for split in ("train", "test"))
    if made is None:
        description = model.describe(config, train, held_out)
        pipeline = model.pipeline(config, description, train)
    else:
        train, held_out = made.source(train, "train"), made.source(held_out, "test")
        if made.base.conditioner.subject == "text":
            made = dataclasses.replace(made, captions=model.shown(held_out))
        description, pipeline = made.describe(), made.pipeline
    _check_data(config, train, held_out)
    update = optimizer.make(config, config.train.steps)
    with field("config.ema"), wrong_types():
        profile = specs.value(config.ema, ema.CHOICES, "config.ema")
    drawer, notes, frozen = None, optimizer.notes(config), {}
    if config.objective.name == "autoencoding":
        objective, frozen = autoencoder.make(config, pipeline)
    elif config.objective.name == "classification":
        objective = objectives.classification(config, pipeline)
    else:
        trained = pipeline if made is None else made.joint
        objective = objectives.denoising(config, trained, _nulls(pipeline, train), train.shape)
        if pretrained_network.is_pretrained(config) and made is None:
            pretrained_network.check(config, objective)
        drawer, found = drawing.drawer(config, pipeline, description.schedule)
        drawer = drawing.given(drawer, lambda: held_out)
        judging.make(config, pipeline, None)
        chosen, name = config.train.validation_metrics, "config.train.validation_metrics"
        judging.make(config, pipeline, None, chosen, name)
        notes += [*objectives.notes(config, pipeline, objective), *found]
        random = not deterministic(drawer.sampler.solver)
        if random and objective.coupling is not couplings.independent:
            notes.append(
                f"config.objective.coupling={config.objective.coupling!r}: the model's flow is "
                f"right, its score is not, and config.sampler.solver={config.sampler.solver!r} "
                "draws noise; ddim, heun and dpmpp_2m do not"
            )
        objective, train, frozen = terms.attach(config, objective, train)
        objective, train, teacher = teachers.attach(
            config, objective, pipeline, train, None if made is None else made.frozen
        )
        frozen = frozen | teacher
        if made is not None:
            objective, frozen = made.objective(objective), frozen | {BASE: made.frozen}
    emas = {"ema": profile} | _snapshots(config)
    _check_shapes(objective, train, frozen or None, emas)
    return Experiment(
        config=config,
        train=train,
        held_out=held_out,
        description=description,
        pipeline=pipeline,
        objective=objective,
        optimizer=update,
        emas=emas,
        drawer=drawer,
        frozen=frozen or None,
        adaptation=made,
        notes=tuple(notes),
    )


def _nulls(pipeline: Pipeline, train: Source) -> dict[str, Any]:
    """Fields of the conditioning that stands for none; pictures of zeros stand for no picture."""
    conditioner = pipeline.conditioner
    nulls = {name: 0.0 for name in ("image", "image_features") if name in train[0]}
    if conditioner.subject == "label":
        return nulls | {"label": conditioner.count}
    if conditioner.subject != "text":
        return nulls
    return nulls | {name: value[0] for name, value in train.encode([""]).items()}


def _snapshots(config: ConfigDict) -> dict[str, ema.Profile]:
    """The averages that snapshots are saved of."""
    c = config.train
    if not c.snapshot_every:
        return {}
    with field("config.train.snapshot_sigma_rel"):
        widths = c.snapshot_sigma_rel
        if not isinstance(widths, tuple) or not widths or len(set(widths)) < len(widths):
            raise ValueError(f"expected one or more different widths, as in (0.05, 0.10): {widths}")
        return snapshots.profiles(widths)


def _check_data(config: ConfigDict, train: Source, held_out: Source) -> None:
    if config.data.flip and train.view != "images":
        raise ValueError(f"config.data.flip=True mirrors images, and {train.name} has none")
    with field("config.data"):
        batches.check(augmentation(config.data), train)
    c = config.train
    if c.keep_best and "validation" in c.best and not c.validate_every:
        raise ValueError(
            f"config.train.best={c.best!r} needs config.train.validate_every, which is 0"
        )
    name, high = c.best.removeprefix("-"), c.best.startswith("-")
    better = merits.merit(name).better
    if c.keep_best and better and high != (better == merits.HIGHER):
        right = f"-{name}" if better == merits.HIGHER else name
        raise ValueError(
            f"config.train.best={c.best!r} would keep the worst: {better} is better, so write "
            f"{right!r}"
        )
    if texts(c.validation_metrics) and not c.validate_every:
        raise ValueError(
            "config.train.validation_metrics are taken every config.train.validate_every steps, "
            "which is 0"
        )
    if c.validate_every and not len(held_out):
        raise ValueError(f"config.train.validate_every={c.validate_every}: no data are held out")


def _check_layout(config: ConfigDict) -> None:
    with field("config.parallel"):
        parallel.make(config.parallel)
    pieces = jax.device_count() * config.train.accumulate
    size = config.train.batch_size
    if size % pieces:
        lower, upper = size // pieces * pieces, -(-size // pieces) * pieces
        raise ValueError(
            f"config.train.batch_size={size} is not divisible by {pieces} = "
            f"{jax.device_count()} devices x {config.train.accumulate} pieces "
            f"(train.accumulate); nearest: {f'{lower} or ' if lower else ''}{upper}"
        )


def _check_shapes(objective: Objective, train: Source, frozen: Any, emas: Iterable[str]) -> None:
    """Traces initialisation and loss without computing: shape errors show before compilation."""
    first = None
    for part in train.buckets or (train,):
        example = part[0]
        batch = {k: np.repeat(np.asarray(v)[None], 2, axis=0) for k, v in example.items()}
        what = f"the network does not fit {'the data' if part is train else f'the {BUCKET}'}"
        with field(what.format(*part.shape)):
            params = jax.eval_shape(objective.init, jax.random.key(0), batch)
            first = params if first is None else first
            if jax.tree.map(lambda a: a.shape, params) != jax.tree.map(lambda a: a.shape, first):
                raise ValueError("its parameters depend on the images' size")

            def loss(params, batch=batch):
                context = Context(frozen, dict.fromkeys(emas, params))
                return objective.loss(params, context, batch, jax.random.key(0))

            jax.eval_shape(loss, params)
