"""Samplers by name: every solver on every grid; what a grid cannot be, or a network not see."""

import itertools
import re

import pytest

from diffusion import denoiser, predictions, schedules
from diffusion.models.mlp import MLP
from diffusion.pipelines import samplers
from diffusion.pipelines.pipeline import Pipeline
from diffusion.sampling import grids, solvers

COSINE, FLOW = schedules.cosine(), schedules.RectifiedFlow()


def made(solver="auto", grid="auto", steps=0, schedule=COSINE, prediction=predictions.v):
    c_noise = denoiser.ddpm_index if schedule is COSINE else denoiser.thousand_t
    pipeline = Pipeline("run", MLP(), schedule, prediction, c_noise, (2,))
    return samplers.make(pipeline, solver, grid, steps, at="s.")


# Solvers that jump back need more steps, a table from a file needs its own number of them.
ANY_STEPS = sorted(set(solvers.CHOICES) - {"from_file", "repaint", "restart"})


@pytest.mark.parametrize("name", ANY_STEPS)
def test_every_solver_takes_every_grid_from_one_step_on(name):
    given = ["from_times(times=[1, 0.6, 0.3, 0])", "from_sigmas(sigmas=[80, 5, 0.5, 0])"]
    named = [grid for grid in grids.CHOICES if not grid.startswith(("from_", "flow_"))]
    for grid, steps in [*itertools.product(named, (1, 2, 5)), *itertools.product(given, [7])]:
        expected = 3 if grid in given else steps
        assert made(name, grid, steps).solver.evaluations >= expected


@pytest.mark.parametrize("name", ["restart", "repaint(jump_length=2, resamples=3)"])
def test_solvers_that_jump_back(name):
    assert made(name, "karras", 20).solver.evaluations > 20


@pytest.mark.parametrize("grid", ["flow_shift(shift=2.0)", "flow_shift_for(tokens=1024)"])
def test_grids_of_flows(grid):
    times = made(grid=grid, schedule=FLOW).solver.level.t
    assert times[0] == 1 and 1 > times[10] > 0.5
    with pytest.raises(ValueError, match="needs no signal at t_max"):
        made(grid=grid)


@pytest.mark.parametrize(
    "grid, expected",
    [
        ("uniform", []),
        ("from_sigmas(sigmas=[80, 5, 0])", ["the levels of 2 steps"]),
        (
            "from_times(times=[0.5, 0.3, 0.1])",
            ["the levels of 2 steps", "starts at sigma / alpha = 1.01", "keep noise of .* = 0.169"],
        ),
    ],
)
def test_what_is_odd_about_given_levels_is_noted(grid, expected):
    notes = samplers.notes(made(grid=grid), grid)
    assert len(notes) == len(expected)
    for note, pattern in zip(notes, expected):
        assert re.search(pattern, note)


EPS = {"schedule": FLOW, "prediction": predictions.eps}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(solver="dpm"), r"s\.solver: unknown 'dpm'"),
        (dict(solver="ddim(eta=2.0)"), r"s\.solver='ddim\(eta=2\.0\)': eta must"),
        (dict(solver="midpoint(schedule=3)"), r"s\.solver: midpoint has no option 'schedule'"),
        (
            dict(solver="dpm_solver(order=3)", steps=2),
            r"s\.solver='dpm_solver\(order=3\)': order=3 needs as many steps, but s\.steps=2",
        ),
        (
            dict(solver="edm(s_noise=1e999)"),
            r"s\.solver='edm\(s_noise=1e999\)': s_noise must be a finite",
        ),
        (dict(steps=-1), r"s\.steps=-1 must be at least 1"),
        (dict(grid="leading", steps=2000), r"s\.grid='leading', steps=2000: .*more than the 1000"),
        (dict(grid="uniform(steps=5)"), r"s\.grid: uniform has no option 'steps'; its .*: none"),
        (dict(grid="from_times"), r"s\.grid='from_times': from_times needs times, as in"),
        (dict(grid="from_sigmas(sigma=[9, 0])"), r"no option 'sigma'; its options: sigmas"),
        (dict(grid="from_times(times=[0.5, 0.7, 0])"), r"s\.grid='from_times.*0\.5 then 0\.7"),
        (
            dict(grid="from_sigmas(sigmas=[1e9, 1, 0])"),
            r"s\.grid='from_sigmas.*lies beyond the schedule's sigma_max = 20291",
        ),
        (dict(grid="karras(sigma_min='a')"), r"sigma_min='a'\) has the wrong type; expected float"),
        (dict(grid="karras(rho=0.001)"), r"s\.grid='karras\(rho=0\.001\)'.*out of range"),
        (EPS, r"prediction says nothing about x_0 at alpha = 0, where .* with s\.grid; choose the"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_a_network_that_sees_the_logarithm_of_sigma_cannot_start_at_pure_noise():
    options = "run", MLP(), FLOW, predictions.v, denoiser.log_sigma, (2,)
    with pytest.raises(ValueError, match="c_noise is infinite at alpha = 0, where sampling starts"):
        samplers.make(Pipeline(*options))
