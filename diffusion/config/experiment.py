"""From a config to an experiment.

Whatever can be found wrong with a config is found here, before anything is compiled, and named by
its field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import ema, specs
from diffusion.config import (
    acceleration,
    averages,
    consistency,
    initialization,
    latents,
    optimizer,
    pretrained_network,
    ranges,
    sampler,
    terms,
)
from diffusion.config import autoencoder as autoencoding
from diffusion.config import guidance as guiding
from diffusion.config.data import augmentation, make_source
from diffusion.config.errors import field, wrong_types
from diffusion.config.guidance import Guidance
from diffusion.config.model import make_model, other_run
from diffusion.data import batches
from diffusion.data.sources import Source
from diffusion.evaluation.convergence import deterministic
from diffusion.evaluation.metrics import bits
from diffusion.objectives import couplings
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.objective import Context, Objective
from diffusion.runs import snapshots
from diffusion.sampling import langevin
from diffusion.training import optimizers, parallel

BUCKET = "bucket {} x {} of config.data.buckets"
JUDGES = ("digits_svc", "lenet5")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes: data, objective, how to train, how to sample.

    Attributes:
      config: the config, resolved.
      train, held_out: the data.
      objective: what is minimised.
      optimizer: the update.
      emas: averages of the parameters, by name.
      num_classes: of the labels that the network is given or tells; 0 if unconditional.
      solver: the sampler's table; None for a classifier or an autoencoder.
      guidance: of sampling; None likewise.
      corrector: what follows each of the solver's steps, or None.
      likelihood: how bits per dimension are measured, or None.
      autoencoder: of the images whose latents the data are, or None.
      frozen: parameters that the objective needs and that are not trained, or None.
      notes: what a user should know about this combination.
    """

    config: ConfigDict
    train: Source
    held_out: Source
    objective: Objective
    optimizer: optimizers.Optimizer
    emas: dict[str, ema.Profile]
    num_classes: int
    solver: Any = None
    guidance: Guidance | None = None
    corrector: langevin.Corrector | None = None
    likelihood: bits.Estimator | None = None
    autoencoder: latents.Autoencoder | None = None
    frozen: Any = None
    notes: tuple[str, ...] = ()


def build(config: ConfigDict) -> Experiment:
    """The experiment of a config.

    Raises:
      ValueError: a field has an impossible value, or two do not fit; the message names them.
    """
    ranges.check(config)
    _check_layout(config)
    _check_judge(config)
    initialization.check(config)
    averages.check(config)
    train, held_out = (make_source(config.data, split) for split in ("train", "test"))
    _check_data(config, train, held_out)
    objective, num_classes = make_model(config, train)
    update = optimizer.make(config, config.train.steps)
    with field("config.ema"), wrong_types():
        profile = specs.value(config.ema, ema.CHOICES, "config.ema")
    drawing, notes = {}, []
    if config.evaluation.classifier == "lenet5" and not config.evaluation.weights:
        notes.append("samples are not judged: config.evaluation.weights names no LeNet-5 file")
    if isinstance(objective, Denoising):
        if pretrained_network.wanted(config):
            pretrained_network.check(config, objective)
        encode = train.encode if config.objective.conditional else None
        if config.samples.captions and encode is None:
            raise ValueError(
                f"config.samples.captions={config.samples.captions!r}: this model is given none"
            )
        solver = sampler.make_solver(config, objective)
        drawing = {
            "solver": solver,
            "guidance": guiding.make(
                config, objective, num_classes, train.shape, solver.level, other_run, encode
            ),
            "corrector": sampler.make_corrector(config, objective, solver),
            "likelihood": sampler.make_likelihood(config, objective),
        }
        if drawing["corrector"] is not None:
            guiding.check_corrector(config, drawing["guidance"])
        notes += sampler.notes(config, sampler.make_grid(config, objective))
        guidance = drawing["guidance"]
        notes += guiding.notes(config, guidance)
        notes += acceleration.notes(guidance.acceleration, objective.network, train.shape)
        if objective.coupling is not couplings.independent and not deterministic(solver):
            notes.append(
                f"config.objective.coupling={config.objective.coupling!r}: the model's flow is "
                f"right, its score is not, and config.sampler.solver={config.sampler.solver!r} "
                "draws noise; ddim, heun and dpmpp_2m do not"
            )
    objective, train, frozen = terms.attach(config, objective, train, other_run)
    objective, teacher = consistency.attach(config, objective, num_classes, train.shape, other_run)
    frozen = frozen | teacher | autoencoding.frozen(config) or None
    emas = {"ema": profile} | _snapshots(config)
    _check_shapes(objective, train, frozen, emas)
    return Experiment(
        config=config,
        train=train,
        held_out=held_out,
        objective=objective,
        optimizer=update,
        emas=emas,
        num_classes=num_classes,
        autoencoder=latents.autoencoder(config.data),
        frozen=frozen,
        notes=tuple(notes),
        **drawing,
    )


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


def _check_judge(config: ConfigDict) -> None:
    c = config.evaluation
    if c.classifier and c.classifier not in JUDGES:
        raise specs.unknown("config.evaluation.classifier", c.classifier, JUDGES)
    if c.weights and not Path(c.weights).is_file():
        raise ValueError(f"config.evaluation.weights={c.weights!r}: there is no such file")


def _check_data(config: ConfigDict, train: Source, held_out: Source) -> None:
    if config.data.flip and len(train.shape) != 3:
        raise ValueError(f"config.data.flip=True mirrors images, and {train.name} has none")
    with field("config.data"):
        batches.check(augmentation(config.data), train)
    c = config.train
    if c.keep_best and "validation" in c.best and not c.validate_every:
        raise ValueError(
            f"config.train.best={c.best!r} needs config.train.validate_every, which is 0"
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
