"""What a config leaves open suits its schedule: few steps of an exact network land at the data."""

from functools import partial

import jax
import numpy as np
import pytest
from cases import PREDICTIONS, SCHEDULES

from diffusion import predictions
from diffusion.denoiser import denoiser
from diffusion.sampling import grids, solvers
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample

MODES = np.array([[-1.0, -0.5], [0.2, 1.0], [1.2, -0.3]])
STD = 0.05


def exact_network(prediction):
    """F of the exact denoiser, through which the denoiser has to be found again."""
    exact = gaussian_mixture(MODES, STD)

    def denoise(x, level):
        c = predictions.precondition(prediction, level)
        output = (exact(x, level) - c.c_skip * x) / c.c_out
        return denoiser(lambda *_: output, prediction, lambda level: level.t)(x, level, None)

    return denoise


@pytest.mark.parametrize("name", PREDICTIONS)
def test_twenty_steps_land_within_five_percent_of_what_many_do(name):
    prediction = PREDICTIONS[name]
    run = jax.jit(partial(sample, exact_network(prediction)), static_argnums=2)
    keys = image_keys(0, np.arange(600))
    for schedule in SCHEDULES.values():
        if name == "eps" and schedule(schedule.t_max).alpha == 0:
            continue  # refused: eps says nothing about the data there
        shares = []
        for solver in (solvers.dpmpp_2m, solvers.ddim):
            x = run(solver(getattr(grids, grids.usual(schedule))(schedule, 20)), keys, (2,))
            nearest = np.linalg.norm(np.asarray(x)[:, None] - MODES, axis=-1).min(1)
            shares.append(np.mean(nearest < 4 * STD))
        assert min(shares) > 0.95, (schedule, shares)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (1, 2)])
def test_estimates_of_another_shape_are_refused(shape):
    """They would be broadcast."""
    table = solvers.ddim(grids.uniform(SCHEDULES["cosine"], 2))
    keys = image_keys(0, np.arange(3))
    with pytest.raises(ValueError, match=r"the shape of its input, \(3, 2\), got"):
        sample(lambda x, level: np.zeros(shape), table, keys, (2,))
