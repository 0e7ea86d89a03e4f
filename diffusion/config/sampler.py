"""From a config to a sampler: grid, table, corrector; and how likelihoods are measured."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import predictions, specs
from diffusion.config.errors import field, wrong_types
from diffusion.evaluation.metrics import bits
from diffusion.levels import NoiseLevel
from diffusion.objectives.denoising import Denoising
from diffusion.pretrained.schedulers import Sampler
from diffusion.sampling import grids, langevin, solvers

FAINT = 3.0  # a sigma / alpha at which there is still much of the image


def make_solver(
    config: ConfigDict,
    objective: Denoising | Sampler,
    called: str = "config.sampler.solver",
    grid: NoiseLevel | None = None,
) -> Any:
    """The sampler's table for config.sampler, checked against what the network predicts.

    ``called`` is what errors call the solver's; ``grid`` is by default the config's.
    """
    c = config.sampler
    schedule = {"schedule": objective.schedule}
    filled = ("grid", "schedule")
    solver_function = specs.function(c.solver, solvers.CHOICES, called, schedule, filled)
    grid = make_grid(config, objective) if grid is None else grid
    steps = len(grid.t) - 1
    with field(f"{called}={c.solver!r}"), wrong_types():
        options = getattr(solver_function, "keywords", {})
        if isinstance(order := options.get("order"), int) and order > steps:
            raise ValueError(f"order={order} needs as many steps, but config.sampler.steps={steps}")
        solver = solver_function(grid)
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(solver)):
            raise ValueError(f"its coefficients are not finite on config.sampler.grid={c.grid!r}")

    def told(name: str) -> str:
        given = config.get("objective")  # a pretrained model's are not config fields
        return f"config.objective.{name}={given[name]!r}" if given else f"the model's {name}"

    levels = NoiseLevel(*(np.asarray(leaf, np.float32) for leaf in solver.level))
    with np.errstate(all="ignore"):
        coefficients = predictions.precondition(objective.prediction, levels)
        seen = objective.c_noise(levels)
    if not all(np.all(np.isfinite(leaf)) for leaf in coefficients):
        raise ValueError(
            f"{told('prediction')} says nothing about x_0 at alpha = 0, where sampling starts with "
            f"{told('schedule')} and grid={c.grid!r}; choose x0, v, flow or edm, or a grid that "
            "starts below t_max"
        )
    if not np.all(np.isfinite(seen)):
        raise ValueError(
            f"{told('c_noise')} is infinite where sampling starts (alpha = 0); choose ddpm_index "
            "or thousand_t"
        )
    return solver


def make_grid(config: ConfigDict, objective: Denoising | Sampler) -> NoiseLevel:
    """The noise levels of config.sampler.grid and steps; given times or sigmas are as many."""
    c = config.sampler
    filled = {"schedule": objective.schedule, "steps": c.steps}
    grid_function = specs.function(c.grid, grids.CHOICES, "config.sampler.grid", filled, filled)
    name = f"config.sampler.grid={c.grid!r}"
    with field(name if gives_levels(c) else f"{name}, steps={c.steps}"), wrong_types():
        return grid_function()


def gives_levels(c: ConfigDict) -> bool:
    """Whether config.sampler.grid is given level by level, whatever the number of steps."""
    return c.grid.strip().startswith("from_")


def make_corrector(
    config: ConfigDict, objective: Denoising, solver: Any
) -> langevin.Corrector | None:
    """What follows each of the solver's steps, or None."""
    c = config.sampler
    if not c.corrector:
        return None
    corrector = specs.function(c.corrector, langevin.CHOICES, "config.sampler.corrector")
    with field(f"config.sampler.corrector={c.corrector!r}, solver={c.solver!r}"):
        langevin.check_predictor(solver, make_grid(config, objective))
        level = NoiseLevel(*(jnp.float32(leaf[-1]) for leaf in solver.level))
        example, key = jnp.zeros((1, 1)), jax.random.split(jax.random.key(0), 1)
        jax.eval_shape(partial(corrector, lambda x, _: x), example, level, key)  # its own checks
    return corrector


def make_likelihood(config: ConfigDict, objective: Denoising) -> bits.Estimator | None:
    """How bits per dimension are measured, or None."""
    text = config.evaluation.likelihood
    if not text:
        return None
    with field(f"config.evaluation.likelihood={text!r}"):
        estimator = specs.value(text, bits.CHOICES, "config.evaluation.likelihood")
    with field(f"config.evaluation.likelihood={text!r}"), jax.enable_x64(False):
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


def notes(config: ConfigDict, grid: NoiseLevel) -> list[str]:
    """What is odd about the grid, if anything."""
    said = []
    if gives_levels(config.sampler):
        said.append(
            f"config.sampler.grid gives the levels of {len(grid.t) - 1} steps; "
            "config.sampler.steps is not used"
        )
    if grid.sigma[0] < FAINT * grid.alpha[0]:
        said.append(
            f"sampling starts at sigma / alpha = {grid.ratio[0]:.3g} (config.sampler.grid): noise "
            "alone is not what images look like there"
        )
    if grid.sigma[-1] > 0:
        said.append(
            f"samples keep noise of sigma / alpha = {grid.ratio[-1]:.3g}, where config.sampler.grid"
            " ends; end it with 0 for clean ones"
        )
    return said
