"""From a config to an experiment. The one place, beside main.py and configs/, that reads configs.

Whatever can be found wrong with a config is found here, before anything is compiled, and named by
its field.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import denoiser, predictions, schedules, specs
from diffusion.conditioning import null_like
from diffusion.data import sources
from diffusion.data.sources import Source
from diffusion.levels import NoiseLevel
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.unet import UNet
from diffusion.objectives import distances, times, weightings
from diffusion.objectives.denoising import Denoising, Uncertainty
from diffusion.objectives.variance import VariationalBound
from diffusion.sampling import grids, solvers
from diffusion.training import ema, optimizers

SCHEDULES = {
    **specs.choices(schedules, "linear scaled_linear cosine sigmoid zero_terminal_snr"),
    "vp_sde": schedules.VPSDE,
    "sub_vp_sde": schedules.SubVPSDE,
    "ve": schedules.VE,
    "edm": schedules.EDM,
    "rectified_flow": schedules.RectifiedFlow,
    "trigonometric_flow": schedules.TrigonometricFlow,
    "shifted": lambda schedule, shift: schedule.shifted(shift),
}
PREDICTIONS = specs.choices(predictions, "eps x0 v flow edm")
C_NOISE = specs.choices(denoiser, "ddpm_index thousand_t log_sigma")
TIMES = specs.choices(times, "uniform discrete logit_normal mode cosmap log_normal")
WEIGHTINGS = specs.choices(
    weightings, "simple snr truncated_snr min_snr soft_min_snr p2 sigmoid edm elbo"
)
DISTANCES = specs.choices(distances, "l2 l1 pseudo_huber")
EMAS = specs.choices(ema, "constant power_function")
GRIDS = specs.choices(grids, "uniform leading linspace karras exponential from_times from_sigmas")
SOLVERS = specs.choices(solvers, " ".join(solvers.__all__))
MODELS = {"unet": UNet, "dit": DiT, "mlp": MLP}
JUDGES = ("digits_svc", "lenet5")
FAINT = 3.0  # a sigma / alpha at which there is still much of the image
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes: data, objective, how to train, how to sample.

    Attributes:
      config: the config, resolved.
      train, held_out: the data.
      objective: what is minimised.
      optimizer: the update.
      emas: averages of the parameters, by name.
      solver: the sampler's table.
      num_classes: of the labels that the network is given; 0 if unconditional.
      notes: what a user should know about this combination.
    """

    config: ConfigDict
    train: Source
    held_out: Source
    objective: Denoising
    optimizer: optimizers.Optimizer
    emas: dict[str, ema.Profile]
    solver: Any
    num_classes: int
    notes: tuple[str, ...] = ()


def build(config: ConfigDict) -> Experiment:
    """The experiment of a config.

    Raises:
      ValueError: a field has an impossible value, or two do not fit; the message names them.
    """
    _check_numbers(config)
    _check_judge(config)
    train, held_out = (_source(config.data, split) for split in ("train", "test"))
    conditional = config.objective.conditional and train.num_classes > 0
    num_classes = train.num_classes if conditional else 0
    network = _network(config, num_classes, train.shape)
    objective = _objective(config, network, num_classes)
    optimizer = _optimizer(config)
    with _field("config.ema"):
        profile = specs.function(config.ema, EMAS, "config.ema")()
    solver = make_solver(config, objective)
    _check_shapes(objective, train, config.train.batch_size)
    return Experiment(
        config,
        train,
        held_out,
        objective,
        optimizer,
        {"ema": profile},
        solver,
        num_classes,
        _notes(config, num_classes, make_grid(config, objective)),
    )


def make_solver(
    config: ConfigDict, objective: Denoising, field: str = "config.sampler.solver"
) -> Any:
    """The sampler's table for config.sampler, checked against what the network predicts.

    ``field`` is what errors call the solver's.
    """
    c = config.sampler
    schedule = {"schedule": objective.schedule}
    solver_function = specs.function(c.solver, SOLVERS, field, schedule, ("grid", "schedule"))
    grid = make_grid(config, objective)
    steps = len(grid.t) - 1
    with _field(f"{field}={c.solver!r}"), _wrong_types():
        options = getattr(solver_function, "keywords", {})
        if isinstance(order := options.get("order"), int) and order > steps:
            raise ValueError(f"order={order} needs as many steps, but config.sampler.steps={steps}")
        solver = solver_function(grid)
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(solver)):
            raise ValueError(f"its coefficients are not finite on config.sampler.grid={c.grid!r}")
    levels = NoiseLevel(*(np.asarray(leaf, np.float32) for leaf in solver.level))
    with np.errstate(all="ignore"):
        coefficients = predictions.precondition(objective.prediction, levels)
        seen = objective.c_noise(levels)
    if not all(np.all(np.isfinite(leaf)) for leaf in coefficients):
        raise ValueError(
            f"config.objective.prediction={config.objective.prediction!r} says nothing about x_0 "
            f"at alpha = 0, where sampling starts with schedule={config.objective.schedule!r} and "
            f"grid={c.grid!r}; choose x0, v, flow or edm, or a grid that starts below t_max"
        )
    if not np.all(np.isfinite(seen)):
        raise ValueError(
            f"config.objective.c_noise={config.objective.c_noise!r} is infinite where sampling "
            f"starts (alpha = 0); choose ddpm_index or thousand_t"
        )
    return solver


def make_grid(config: ConfigDict, objective: Denoising) -> NoiseLevel:
    """The noise levels of config.sampler.grid and steps; given times or sigmas are as many."""
    c = config.sampler
    filled = {"schedule": objective.schedule, "steps": c.steps}
    grid_function = specs.function(c.grid, GRIDS, "config.sampler.grid", filled, filled)
    name = f"config.sampler.grid={c.grid!r}"
    with _field(name if gives_levels(c) else f"{name}, steps={c.steps}"), _wrong_types():
        return grid_function()


def gives_levels(c: ConfigDict) -> bool:
    """Whether config.sampler.grid is given level by level, whatever the number of steps."""
    return c.grid.strip().startswith("from_")


def _source(c: ConfigDict, split: str) -> Source:
    directory = c.dir or None
    with _field(f"config.data.name={c.name!r}"):
        if c.name == "digits":
            return sources.digits(split)
        if c.name == "mnist":
            return sources.mnist(split, directory, padding=c.padding)
        if c.name == "cifar10":
            return sources.cifar10(split, directory)
        if c.name == "latents":
            if directory is None:
                raise ValueError("config.data.dir must name the .npz file of latents")
            return sources.latents(directory, scale=c.scale, num_classes=c.num_classes or None)
        if c.name == "points":
            return sources.points(c.density, seed=0 if split == "train" else 1)
        return sources.tfds(c.name, split, directory)


def _network(config: ConfigDict, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    c, field = config.model, f"config.model.{config.model.name}"
    if c.name not in MODELS:
        raise specs.unknown("config.model.name", c.name, MODELS)
    if c.dtype not in DTYPES:
        raise specs.unknown("config.model.dtype", c.dtype, DTYPES)
    if (c.name == "mlp") != (len(shape) == 1):
        kind = "points" if len(shape) == 1 else "images"
        raise ValueError(
            f"config.model.name={c.name!r} does not take {kind} (config.data.name="
            f"{config.data.name!r}); choose {'mlp' if kind == 'points' else 'unet or dit'}"
        )
    options = dict(c[c.name], dtype=DTYPES[c.dtype])
    learned = config.objective.learned_variance
    with _field(field):
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


def _objective(config: ConfigDict, network: nn.Module, num_classes: int) -> Denoising:
    c, at = config.objective, "config.objective"
    with _field(f"{at}.schedule={c.schedule!r}"):
        schedule = specs.value(c.schedule, SCHEDULES, f"{at}.schedule")
    context = {"sigma_data": config.data.std, "schedule": schedule}
    bound = None
    if c.learned_variance:
        if not isinstance(schedule, schedules.Table) or not c.times.startswith("discrete"):
            raise ValueError(
                f"{at}.learned_variance=True bounds a chain of discrete steps: it needs a table "
                f"schedule (linear, scaled_linear, cosine, sigmoid) and times='discrete', got "
                f"schedule={c.schedule!r}, times={c.times!r}"
            )
        bound = VariationalBound(steps=schedule.steps, weight=c.vlb_weight)
    context_times = {"steps": schedule.steps} if isinstance(schedule, schedules.Table) else {}
    return Denoising(
        network=network,
        schedule=schedule,
        prediction=specs.function(c.prediction, PREDICTIONS, f"{at}.prediction", context),
        c_noise=_c_noise(c.c_noise, schedule),
        times=specs.function(c.times, TIMES, f"{at}.times", context_times),
        weighting=specs.function(c.weighting, WEIGHTINGS, f"{at}.weighting", context),
        distance=specs.function(c.distance, DISTANCES, f"{at}.distance"),
        null=partial(null_like, label=num_classes),
        dropout=c.label_dropout if num_classes else 0.0,
        stratify=config.train.batch_size if c.stratified else None,
        t_min=c.t_min,
        bound=bound,
        uncertainty=Uncertainty() if c.uncertainty else None,
    )


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
    return specs.function(text, C_NOISE, "config.objective.c_noise", context)


def _optimizer(config: ConfigDict) -> optimizers.Optimizer:
    c = config.optimizer
    with _field("config.optimizer"):
        return optimizers.make(
            c.name,
            c.learning_rate,
            warmup=c.warmup,
            decay=c.decay,
            decay_start=c.decay_start,
            steps=config.train.steps,
            b1=c.b1,
            b2=c.b2,
            eps=c.eps,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm or None,
        )


def _check_judge(config: ConfigDict) -> None:
    c = config.evaluation
    if c.classifier and c.classifier not in JUDGES:
        raise specs.unknown("config.evaluation.classifier", c.classifier, JUDGES)
    if c.weights and not Path(c.weights).is_file():
        raise ValueError(f"config.evaluation.weights={c.weights!r}: there is no such file")


def _check_numbers(config: ConfigDict) -> None:
    positive = ["train.steps", "train.batch_size", "train.accumulate", "train.log_every"]
    positive += ["train.checkpoint_every", "train.keep", "sampler.steps", "sampler.batch_size"]
    positive += ["samples.count", "samples.columns", "optimizer.learning_rate", "data.std"]
    for name in positive:
        section, field = name.split(".")
        if not config[section][field] > 0:
            raise ValueError(f"config.{name} must be positive, got {config[section][field]}")
    if not config.sampler.preview_every >= 0:
        raise ValueError(
            f"config.sampler.preview_every must be >= 0, got {config.sampler.preview_every}"
        )
    if not 0 <= config.objective.label_dropout <= 1:
        raise ValueError(
            f"config.objective.label_dropout must lie in [0, 1], got "
            f"{config.objective.label_dropout}"
        )
    pieces = jax.local_device_count() * config.train.accumulate
    size = config.train.batch_size
    if size % pieces:
        lower, upper = size // pieces * pieces, -(-size // pieces) * pieces
        raise ValueError(
            f"config.train.batch_size={size} is not divisible by {pieces} = "
            f"{jax.local_device_count()} devices x {config.train.accumulate} pieces "
            f"(train.accumulate); nearest: {f'{lower} or ' if lower else ''}{upper}"
        )


def _check_shapes(objective: Denoising, train: Source, batch_size: int) -> None:
    """Traces initialisation and loss without computing: shape errors show before compilation."""
    example = train[0]
    batch = {k: np.repeat(np.asarray(v)[None], 2, axis=0) for k, v in example.items()}
    with _field("the network does not fit the data"):
        params = jax.eval_shape(objective.init, jax.random.key(0), batch)
        jax.eval_shape(lambda p: objective.loss(p, {}, batch, jax.random.key(0)), params)


def _notes(config: ConfigDict, num_classes: int, grid: NoiseLevel) -> tuple[str, ...]:
    notes = []
    if config.sampler.guidance != 1 and not num_classes:
        notes.append(
            f"config.sampler.guidance={config.sampler.guidance} has no effect: the model is "
            "unconditional"
        )
    if gives_levels(config.sampler):
        notes.append(
            f"config.sampler.grid gives the levels of {len(grid.t) - 1} steps; "
            "config.sampler.steps is not used"
        )
    if grid.sigma[0] < FAINT * grid.alpha[0]:
        notes.append(
            f"sampling starts at sigma / alpha = {grid.ratio[0]:.3g} (config.sampler.grid): noise "
            "alone is not what images look like there"
        )
    if grid.sigma[-1] > 0:
        notes.append(
            f"samples keep noise of sigma / alpha = {grid.ratio[-1]:.3g}, where config.sampler.grid"
            " ends; end it with 0 for clean ones"
        )
    if config.evaluation.classifier == "lenet5" and not config.evaluation.weights:
        notes.append("samples are not judged: config.evaluation.weights names no LeNet-5 file")
    if config.sampler.guidance != 1 and num_classes and not config.objective.label_dropout:
        raise ValueError(
            f"config.sampler.guidance={config.sampler.guidance} needs a model that was also "
            "trained without labels; set config.objective.label_dropout (0.1, say) or guidance=1"
        )
    return tuple(notes)


@contextlib.contextmanager
def _wrong_types() -> Iterator[None]:
    """Options whose types or sizes numbers cannot have are a user's mistake too."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"an option has a wrong type or size: {error}") from error


@contextlib.contextmanager
def _field(name: str) -> Iterator[None]:
    """Names the config field in a ValueError that does not name one itself."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("config."):
            raise
        raise ValueError(f"{name}: {error}") from error
