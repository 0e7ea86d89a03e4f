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

from diffusion import denoiser, guiding, predictions, schedules, specs
from diffusion.conditioning import null_like
from diffusion.data import sources
from diffusion.data.sources import Source
from diffusion.evaluation import bits
from diffusion.guiding import Guidance
from diffusion.levels import NoiseLevel
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.noisy_classifier import NoisyClassifier
from diffusion.models.unet import UNet
from diffusion.objectives import distances, times, weightings
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising, Uncertainty
from diffusion.objectives.variance import VariationalBound
from diffusion.sampling import grids, langevin, solvers
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
GRIDS = specs.choices(
    grids,
    "uniform leading linspace karras exponential beta flow_shift flow_shift_for from_times "
    "from_sigmas",
)
SOLVERS = specs.choices(solvers, " ".join(solvers.__all__))
CORRECTORS = specs.choices(langevin, "langevin annealed_langevin")
LIKELIHOODS = specs.choices(bits, "ode bound")
MODELS = {"unet": UNet, "dit": DiT, "mlp": MLP}
JUDGES = ("digits_svc", "lenet5")
OBJECTIVES = ("denoising", "classification")
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
      solver: the sampler's table; None for a classifier.
      guidance: of sampling; None for a classifier.
      corrector: what follows each of the solver's steps, or None.
      likelihood: how bits per dimension are measured, or None.
      num_classes: of the labels that the network is given or tells; 0 if unconditional.
      notes: what a user should know about this combination.
    """

    config: ConfigDict
    train: Source
    held_out: Source
    objective: Denoising | Classification
    optimizer: optimizers.Optimizer
    emas: dict[str, ema.Profile]
    solver: Any
    guidance: Guidance | None
    num_classes: int
    corrector: langevin.Corrector | None = None
    likelihood: bits.Estimator | None = None
    notes: tuple[str, ...] = ()


def build(config: ConfigDict) -> Experiment:
    """The experiment of a config.

    Raises:
      ValueError: a field has an impossible value, or two do not fit; the message names them.
    """
    _check_numbers(config)
    _check_judge(config)
    train, held_out = (_source(config.data, split) for split in ("train", "test"))
    objective, num_classes = _model(config, train)
    optimizer = _optimizer(config)
    with _field("config.ema"):
        profile = specs.function(config.ema, EMAS, "config.ema")()
    solver, guide, notes = None, None, _notes(config, None)
    if isinstance(objective, Denoising):
        solver = make_solver(config, objective)
        notes = _notes(config, make_grid(config, objective))
        guide = guiding.make(config, objective, num_classes, train.shape, solver.level, _other_run)
        notes += guiding.notes(config, num_classes)
    _check_shapes(objective, train, config.train.batch_size)
    return Experiment(
        config,
        train,
        held_out,
        objective,
        optimizer,
        {"ema": profile},
        solver,
        guide,
        num_classes,
        None if solver is None else _corrector(config, objective, solver),
        None if solver is None else _likelihood(config, objective),
        tuple(notes),
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


def _model(config: ConfigDict, train: Source) -> tuple[Denoising | Classification, int]:
    """The objective, with its network, and the number of classes."""
    name, classes = config.objective.get("name", "denoising"), train.num_classes
    if name not in OBJECTIVES:
        raise specs.unknown("config.objective.name", name, OBJECTIVES)
    if name == "denoising":
        classes = classes if config.objective.conditional else 0
        network = _network(config, classes, train.shape)
        return _objective(config, network, classes, train.levels), classes
    if not classes:
        raise ValueError(
            f"config.objective.name='classification' needs labels, which config.data.name="
            f"{config.data.name!r} does not have"
        )
    return _classification(config, _classifier(config, classes, train.shape)), classes


def _other_run(config: ConfigDict) -> tuple[Denoising | Classification, int, tuple[int, ...]]:
    """Another run's objective, number of classes and data shape."""
    train = _source(config.data, "train")
    return *_model(config, train), train.shape


def _corrector(config: ConfigDict, objective: Denoising, solver: Any) -> langevin.Corrector | None:
    c = config.sampler
    if not c.corrector:
        return None
    corrector = specs.function(c.corrector, CORRECTORS, "config.sampler.corrector")
    with _field(f"config.sampler.corrector={c.corrector!r}, solver={c.solver!r}"):
        langevin.check_predictor(solver, make_grid(config, objective))
        level = NoiseLevel(*(jnp.float32(leaf[-1]) for leaf in solver.level))
        example, key = jnp.zeros((1, 1)), jax.random.split(jax.random.key(0), 1)
        jax.eval_shape(partial(corrector, lambda x, _: x), example, level, key)  # its own checks
    return corrector


def _likelihood(config: ConfigDict, objective: Denoising) -> bits.Estimator | None:
    text = config.evaluation.likelihood
    if not text:
        return None
    with _field(f"config.evaluation.likelihood={text!r}"):
        estimator = specs.value(text, LIKELIHOODS, "config.evaluation.likelihood")
    with _field(f"config.evaluation.likelihood={text!r}"), jax.enable_x64(False):
        # As in sampling: the network must say something about x_0 where this starts.
        level = objective.schedule(np.float64(objective.schedule.t_max))
        level = NoiseLevel(*(np.asarray(leaf, np.float32) for leaf in level))
        with np.errstate(all="ignore"):
            said = predictions.precondition(objective.prediction, level)
            seen = objective.c_noise(level)
    if not all(np.all(np.isfinite(leaf)) for leaf in (*said, seen)):
        raise ValueError(
            f"config.evaluation.likelihood={text!r} begins at the schedule's noisiest level, "
            f"where alpha = 0 for schedule={config.objective.schedule!r}; this needs "
            "prediction x0, v, flow or edm, and c_noise ddpm_index or thousand_t"
        )
    return estimator


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


def _classifier(config: ConfigDict, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    c = config.model
    if c.name != "unet" or len(shape) != 3:
        raise ValueError(
            f"config.model.name={c.name!r}: a classifier is the encoder of a unet, on images; "
            "choose config.model.name=unet"
        )
    if c.dtype not in DTYPES:
        raise specs.unknown("config.model.dtype", c.dtype, DTYPES)
    with _field("config.model.unet"):
        network = NoisyClassifier(**c.unet, dtype=DTYPES[c.dtype], classes=num_classes)
        network.check(shape[:2])
        return network


def _schedule(text: str) -> schedules.Schedule:
    with _field(f"config.objective.schedule={text!r}"):
        return specs.value(text, SCHEDULES, "config.objective.schedule")


def _shared(config: ConfigDict, schedule: schedules.Schedule) -> dict[str, Any]:
    """What both objectives have: input scaling, what the network is told, which levels."""
    c, at = config.objective, "config.objective"
    context = {"sigma_data": config.data.std, "schedule": schedule}
    steps = {"steps": schedule.steps} if isinstance(schedule, schedules.Table) else {}
    return {
        "schedule": schedule,
        "prediction": specs.function(c.prediction, PREDICTIONS, f"{at}.prediction", context),
        "c_noise": _c_noise(c.c_noise, schedule),
        "times": specs.function(c.times, TIMES, f"{at}.times", steps),
        "stratify": config.train.batch_size if c.stratified else None,
        "t_min": c.t_min,
    }


def _classification(config: ConfigDict, network: nn.Module) -> Classification:
    return Classification(network=network, **_shared(config, _schedule(config.objective.schedule)))


def _objective(config: ConfigDict, network: nn.Module, num_classes: int, levels: int) -> Denoising:
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
        bound = VariationalBound(schedule.steps, c.vlb_weight, levels or 256)
    return Denoising(
        network=network,
        **_shared(config, schedule),
        weighting=specs.function(c.weighting, WEIGHTINGS, f"{at}.weighting", context),
        distance=specs.function(c.distance, DISTANCES, f"{at}.distance"),
        null=partial(null_like, label=num_classes),
        dropout=c.label_dropout if num_classes else 0.0,
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
    positive += ["evaluation.likelihood_count"]
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


def _notes(config: ConfigDict, grid: NoiseLevel | None) -> list[str]:
    notes = []
    if config.evaluation.classifier == "lenet5" and not config.evaluation.weights:
        notes.append("samples are not judged: config.evaluation.weights names no LeNet-5 file")
    if grid is None:
        return notes
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
    return notes


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
