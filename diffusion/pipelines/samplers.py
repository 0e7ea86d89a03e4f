"""From names to a pipeline's sampler: diffusers' scheduler classes, or this project's solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import predictions, specs
from diffusion.errors import field, wrong_types
from diffusion.levels import NoiseLevel
from diffusion.pipelines.few_step_families import CHOICES as FAMILIES
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pretrained import schedulers
from diffusion.pretrained.schedulers import Sampler, from_diffusers
from diffusion.pretrained.schedulers.scheduler import unchanged
from diffusion.sampling import grids, langevin, solvers
from diffusion.sampling.aims import aims
from diffusion.sampling.tables import Solver

AUTO = "auto"
FAINT = 3.0  # a sigma / alpha at which there is still much of the image
MOSTLY = 0.6  # a share of steps or times that leaves too few for the rest


def make(
    pipeline: Pipeline,
    solver: str = AUTO,
    grid: str = AUTO,
    steps: int = 0,
    *,
    strength: float | None = None,
    at: str = "",
    solver_name: str = "",
) -> Sampler:
    """The sampler of a pipeline.

    Args:
      pipeline: what is sampled from.
      solver: a spec of ``solvers.CHOICES``; a class of diffusers with its fields,
        "EulerDiscreteScheduler(use_karras_sigmas=True)"; or "auto", the pipeline's own.
      grid: a spec of ``grids.CHOICES``, for this project's solvers; "auto" is the pipeline's.
      steps: of the solver; 0: as many as the pipeline's.
      strength: in (0, 1], of the part of the schedule that is left, for image to image.
      at: what errors say before the names of the arguments: "config.sampler.".
      solver_name: what errors call the solver instead.

    Raises:
      ValueError: for an impossible argument, which the message names.
    """
    name = solver_name or f"{at}solver"
    few, steps, own = pipeline.few_steps, steps or pipeline.defaults.steps, solver == AUTO
    if steps < 1:
        raise ValueError(f"{at}steps={steps} must be at least 1")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1]")
    if few is not None:
        few.check_steps(steps, f"{at}steps")
    solver = chosen_solver(pipeline, solver)
    if pipeline.scheduler is not None and (not solver or solver[0].isupper()):
        if grid != AUTO:
            raise ValueError(
                f"{at}grid={grid!r} is for this project's solvers: a scheduler of diffusers has "
                "timesteps of its own. Choose a solver, such as dpmpp_2m, or leave the grid out"
            )
        with field(name if solver else "the pipeline's scheduler"), wrong_types():
            given = {"steps": steps, "strength": strength}
            given = few.arguments(steps, strength) if own and few is not None else given
            return from_diffusers(scheduler(pipeline, solver, name), **given)
    kind = solver.partition("(")[0].strip()
    if kind in FAMILIES and kind not in solvers.CHOICES:
        raise ValueError(
            f"{name}={solver!r}: {kind} is a family of few-step checkpoints, which has solver, "
            f"steps and guidance; it is for config.model.family={solver!r}"
        )
    levels = _levels(pipeline, chosen_grid(pipeline, grid), steps, at)
    if strength is not None:
        with field(f"strength={strength}"):
            levels = grids.partial(levels, strength)
    table = make_table(pipeline, solver, levels, name=name, at=at)
    return Sampler(
        pipeline.schedule,
        pipeline.prediction,
        pipeline.c_noise,
        levels,
        table,
        np.asarray(pipeline.c_noise(table.level)),
        unchanged,
    )


def chosen_solver(pipeline: Pipeline, solver: str) -> str:
    """The spec that ``solver`` stands for: itself, or the pipeline's."""
    return pipeline.defaults.solver if solver == AUTO else solver


def chosen_grid(pipeline: Pipeline, grid: str) -> str:
    """The spec that ``grid`` stands for: itself, the pipeline's, or the usual one."""
    grid = pipeline.defaults.grid if grid == AUTO else grid
    return grids.usual(pipeline.schedule) if grid == AUTO else grid


def scheduler(pipeline: Pipeline, solver: str, name: str = "solver") -> Mapping[str, Any]:
    """The scheduler config that a class of diffusers and its options stand for; "": the own one."""
    own = pipeline.scheduler
    if not solver:
        return own
    known: dict[str, Callable] = dict.fromkeys(schedulers.CLASSES, lambda: None)
    kind, positional, options = specs.parse(solver, known, name)
    if positional:
        raise ValueError(f"{name}={solver!r}: options need names")
    asked = options.get("prediction_type")
    means = own.get("prediction_type", asked)
    if asked not in (None, means):
        raise ValueError(
            f"{name}={solver!r}: the network was trained to predict {means}, and its output is "
            f"no {asked}; leave prediction_type out"
        )
    return {**own, **options, "_class_name": kind}


def make_table(
    pipeline: Pipeline, solver: str, grid: NoiseLevel, *, name: str = "solver", at: str = ""
) -> Solver:
    """The table of one of this project's solvers, checked against what the network predicts."""
    filled = ("grid", "schedule")
    function = specs.function(
        solver, solvers.CHOICES, name, {"schedule": pipeline.schedule}, filled
    )
    steps = len(grid.t) - 1
    with field(f"{name}={solver!r}"), wrong_types():
        order = getattr(function, "keywords", {}).get("order")
        if isinstance(order, int) and order > steps:
            raise ValueError(f"order={order} needs as many steps, but {at}steps={steps}")
        table = function(grid)
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(table)):
            raise ValueError("its coefficients are not finite on this grid")
        if getattr(pipeline.image_network, "two_times", False):
            aims(table)
    check_levels(pipeline, table.level, f"where sampling starts with {at}grid")
    return table


def check_levels(pipeline: Pipeline, levels: NoiseLevel, where: str) -> None:
    """Raises ValueError unless the network's output determines x_0 at these levels."""
    levels = NoiseLevel(*(np.asarray(leaf, np.float32) for leaf in levels))
    with np.errstate(all="ignore"):
        coefficients = predictions.precondition(pipeline.prediction, levels)
        seen = pipeline.c_noise(levels)
    if not all(np.all(np.isfinite(leaf)) for leaf in coefficients):
        raise ValueError(
            f"the model's prediction says nothing about x_0 at alpha = 0, {where}; choose the "
            "prediction x0, v, flow or edm in training, or a grid that starts below t_max"
        )
    if not np.all(np.isfinite(seen)):
        raise ValueError(
            f"the model's c_noise is infinite at alpha = 0, {where}; choose ddpm_index or "
            "thousand_t in training, or a grid that starts below t_max"
        )


def make_corrector(text: str, sampler: Sampler, at: str = "") -> langevin.Corrector | None:
    """What follows each of the solver's steps; None for an empty ``text``."""
    if not text:
        return None
    corrector = specs.function(text, langevin.CHOICES, f"{at}corrector")
    with field(f"{at}corrector={text!r}"), wrong_types():
        langevin.check_predictor(sampler.solver, sampler.grid)
        level = NoiseLevel(*(jnp.float32(leaf[-1]) for leaf in sampler.solver.level))
        example, key = jnp.zeros((1, 1)), jax.random.split(jax.random.key(0), 1)
        jax.eval_shape(partial(corrector, lambda x, _: x), example, level, key)  # its own checks
    return corrector


def hand_over(
    base: Mapping[str, Any], refiner: Mapping[str, Any], steps: int, fraction: float, at: str = ""
) -> tuple[Sampler, Sampler]:
    """Samplers of two models that share ``steps``, of their scheduler configs.

    The base model takes the first ``fraction`` of the schedule, in (0, 1): diffusers' denoising_end
    and denoising_start, which both count evaluations. Where two make a step (Heun, KDPM2), the base
    model may therefore stop between them, and the refiner begins with a whole step. Raises
    ValueError where one of the two would have no evaluation, or cannot begin on its way.
    """
    first, last = from_diffusers(base, steps), from_diffusers(refiner, steps)
    total = first.schedule.steps
    cutoff = round(total - fraction * total)
    count = int(np.sum(first.timesteps >= cutoff))
    left = int(np.sum(last.timesteps < cutoff))
    order = 1 + (refiner["_class_name"] in schedulers.TWO_STAGES)
    left += order == 2 and left % 2 == 0  # not between the two evaluations of a step
    if not 0 < count < len(first.timesteps) or not 0 < left < len(last.timesteps):
        raise ValueError(
            f"{at}hand_over={fraction} of {steps} steps leaves one of the two models without any; "
            f"expected a number in (0, 1), {1 / steps:.3g} or more from both ends"
        )
    with field(f"{at}hand_over={fraction}"):
        last = from_diffusers(refiner, steps, begin=(len(last.timesteps) - left) // order)
    table = jax.tree.map(lambda leaf: leaf[:count].copy(), first.solver._replace(init=None))
    if first.scales[0] != 1 and last.scales[0] != 1:  # both have diffusers' latents times alpha
        ratio = last.solver.level.alpha[0] / first.solver.level.alpha[count]
        for leaf in (table.A, table.b, table.b_raw, table.noise, table.noise_upper):
            leaf[-1, 0] *= ratio
    return first._replace(solver=table._replace(init=first.solver.init)), last


def gives_levels(grid: str) -> bool:
    """Whether a grid is given level by level, whatever the number of steps."""
    return grid.strip().startswith("from_")


def notes(sampler: Sampler, grid: str, at: str = "") -> list[str]:
    """What is odd about a grid, if anything."""
    found, levels = [], sampler.grid
    if gives_levels(grid):
        found.append(
            f"{at}grid gives the levels of {len(levels.t) - 1} steps; {at}steps is not used"
        )
    if levels.sigma[0] < FAINT * levels.alpha[0]:
        found.append(
            f"sampling starts at sigma / alpha = {levels.ratio[0]:.3g} ({at}grid): images look "
            "different from noise alone there"
        )
    strong = np.mean(levels.sigma[:-1] > FAINT * levels.alpha[:-1])
    if strong > MOSTLY and len(levels.t) > 10:
        found.append(
            f"{at}grid={grid!r} spends {strong:.0%} of the steps at sigma / alpha > {FAINT:g}, "
            "where nothing can be seen yet; auto spreads them over all noise levels"
        )
    if levels.sigma[-1] > 0:
        found.append(
            f"samples keep noise of sigma / alpha = {levels.ratio[-1]:.3g}, where {at}grid ends; "
            "end it with 0 for clean ones"
        )
    return found


def _levels(pipeline: Pipeline, grid: str, steps: int, at: str) -> NoiseLevel:
    filled = {"schedule": pipeline.schedule, "steps": steps}
    function = specs.function(grid, grids.CHOICES, f"{at}grid", filled, filled)
    name = f"{at}grid={grid!r}"
    with field(name if gives_levels(grid) else f"{name}, steps={steps}"), wrong_types():
        return function()
