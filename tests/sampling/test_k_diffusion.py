"""Against what k-diffusion's own functions gave for the same noise (k_diffusion_reference.py)."""

from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from mixture import MIXTURE, moments
from solver_cases import use

from diffusion import schedules
from diffusion.sampling import grids, solvers
from diffusion.sampling.sample import image_keys, sample
from diffusion.sampling.solvers.dpm_solver import multistep

REFERENCE = np.load(Path(__file__).with_name("k_diffusion_reference.npz"))
SCHEDULE = schedules.EDM(80.0)
GRID = grids.from_sigmas(SCHEDULE, REFERENCE["sigmas"])
STEPS = len(GRID.t) - 1

# The solver, and the row in which each noise that k-diffusion asks for is used.
CASES = {
    "euler": (use(solvers.euler), []),
    "heun": (use(solvers.heun), []),
    "edm": (use(solvers.edm, churn=4.0), [2 * i - 1 for i in range(STEPS)]),
    "dpm2": (use(solvers.dpm2), []),
    "lms": (use(solvers.lms), []),
    "dpmpp_2m": (use(solvers.dpmpp_2m), []),
    "euler_ancestral": (use(solvers.euler_ancestral, eta=0.8, s_noise=1.1), range(STEPS)),
    "dpm2_ancestral": (
        use(solvers.dpm2_ancestral, eta=0.8, s_noise=1.1),
        [2 * i + 1 for i in range(STEPS - 1)],
    ),
    "dpmpp_2s_ancestral": (
        use(solvers.dpmpp_2s_ancestral, eta=0.8, s_noise=1.1),
        [2 * i + 1 for i in range(STEPS - 1)],
    ),
    "dpmpp_sde": (use(solvers.dpmpp_sde, eta=0.8, s_noise=1.1), range(2 * STEPS - 2)),
    "dpmpp_2m_sde": (use(solvers.dpmpp_2m_sde, eta=0.8), range(STEPS)),
    "dpmpp_2m_sde_heun": (use(solvers.dpmpp_2m_sde, kind="heun", eta=0.8), range(STEPS)),
    "dpmpp_3m_sde": (
        use(multistep, order=3, kind="heun", eta=0.8, curvature=1.0),
        range(STEPS),
    ),
}


def deviation(name, sigmas, std=0.5, eta=1.0):
    """Of k-diffusion's result for N(0, std^2): its formulas on coefficients of x_T and all z."""
    z = np.eye(len(sigmas))
    x, old, older, h_1, h_2 = np.hypot(sigmas[0], std) * z[0], None, None, None, None
    for i, (now, after) in enumerate(pairwise(sigmas)):
        denoised = x * std**2 / (std**2 + now**2)
        if after == 0:
            return np.linalg.norm(denoised)
        h = np.log(now) - np.log(after)
        if name == "dpmpp_2m":
            r = h_1 / h if h_1 else None
            d = denoised + (denoised - old) / (2 * r) if h_1 else denoised
            x = after / now * x - np.expm1(-h) * d
        else:
            h_eta = h * (eta + 1)
            x = np.exp(-h_eta) * x - np.expm1(-h_eta) * denoised
            phi_2 = np.expm1(-h_eta) / h_eta + 1
            if h_2:
                r0, r1 = h_1 / h, h_2 / h
                d1_0, d1_1 = (denoised - old) / r0, (old - older) / r1
                x = x + phi_2 * (d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1))
                x = x - (phi_2 / h_eta - 0.5) * (d1_0 - d1_1) / (r0 + r1)
            elif h_1:
                x = x + phi_2 * (denoised - old) * h / h_1
            x = x + z[i + 1] * after * np.sqrt(-np.expm1(-2 * h * eta))
        old, older, h_1, h_2 = denoised, old, h, h_1


@pytest.mark.parametrize(
    "name, expected, with_jump", [("dpmpp_2m", 0.540, 0.500), ("dpmpp_3m_sde", 1.019, 0.538)]
)
def test_overshoots_as_k_diffusion_where_the_last_steps_are_long(name, expected, with_jump):
    grid = grids.leading(schedules.linear(), 40)
    solver = {
        "dpmpp_2m": solvers.dpmpp_2m(grid),
        "dpmpp_3m_sde": multistep(grid, 3, kind="heun", eta=1.0, curvature=1.0),
    }[name]
    found = deviation(name, grid.ratio)
    assert found == pytest.approx(expected, abs=1e-3)
    assert np.sqrt(moments(solver, 0.0, 0.5)[1]) == pytest.approx(found, rel=1e-9)
    lowered = getattr(solvers, name)(grid, jump=2.0)
    assert np.sqrt(moments(lowered, 0.0, 0.5)[1]) == pytest.approx(with_jump, abs=1e-3)


@jax.jit
def run(solver, x, noises):
    return sample(MIXTURE, solver, image_keys(0, range(len(x))), (1,), x_init=x, noises=noises)


@pytest.mark.parametrize("name", CASES)
def test_k_diffusion(name):
    make, rows = CASES[name]
    with jax.enable_x64(True):
        solver = make(GRID, SCHEDULE)
        noises = np.zeros((solver.evaluations + 1, *REFERENCE["x"].shape))
        for row, noise in zip(rows, REFERENCE["noises"]):
            noises[row + 1] = noise  # place 0 is the initial noise's
        end = run(solver, REFERENCE["x"], noises)
    np.testing.assert_allclose(end, REFERENCE[name], rtol=1e-9, atol=1e-10)
    if len(rows):  # the noise matters
        assert np.abs(run(solver, REFERENCE["x"], 0 * noises) - REFERENCE[name]).max() > 0.01
