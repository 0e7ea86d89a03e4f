"""Against what k-diffusion's own functions gave for the same noise (k_diffusion_reference.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest
from mixture import MIXTURE
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
