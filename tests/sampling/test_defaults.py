"""What a config leaves open suits its schedule: few steps of an exact network land at the data."""

from functools import partial

import jax
import mixture
import numpy as np
import pytest
from cases import PREDICTIONS, SCHEDULES
from scipy.special import ndtri

from diffusion import predictions
from diffusion.denoiser import denoiser, thousand_t
from diffusion.levels import NoiseLevel
from diffusion.pipelines import samplers
from diffusion.pipelines.pipeline import Pipeline
from diffusion.sampling import grids, solvers
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample

MODES = np.array([[-1.0, -0.5], [0.2, 1.0], [1.2, -0.3]])
STD = 0.05


def exact_network(prediction, exact):
    """F of the exact denoiser, through which the denoiser has to be found again."""

    def denoise(x, level):
        c = predictions.precondition(prediction, level)
        output = (exact(x, level) - c.c_skip * x) / c.c_out
        return denoiser(lambda *_: output, prediction, lambda level: level.t)(x, level, None)

    return denoise


@pytest.mark.parametrize("name", PREDICTIONS)
def test_twenty_steps_land_within_five_percent_of_what_many_do(name):
    prediction = PREDICTIONS[name]
    run = jax.jit(
        partial(sample, exact_network(prediction, gaussian_mixture(MODES, STD))), static_argnums=2
    )
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


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_defaults_land_where_the_exact_flow_does(prediction):
    """20 steps with an exact network, from quantiles of the initial noise: the samples' quantiles
    are within 5 % of the data's deviation, for every schedule."""
    row, p = PREDICTIONS[prediction], (np.arange(21) + 0.5) / 21

    denoise = exact_network(row, mixture.MIXTURE)
    draw = jax.jit(
        lambda table, x: sample(denoise, table, image_keys(0, range(len(p))), (1,), x_init=x)
    )
    clean = NoiseLevel(0.0, 1.0, 0.0)
    right, mean = mixture.quantile(p, clean), mixture.WEIGHTS @ mixture.MEANS
    std = np.sqrt(mixture.WEIGHTS @ (mixture.STDS**2 + mixture.MEANS**2) - mean**2)
    for name, schedule in SCHEDULES.items():
        pipeline = Pipeline("run", None, schedule, row, thousand_t, (1,))
        try:
            table = samplers.make(pipeline).solver
        except ValueError as error:
            assert prediction == "eps" and "prediction says nothing about x_0" in str(error), name
            continue
        x = draw(table, np.float32(table.init * ndtri(p))[:, None])
        assert np.abs(x - right).mean() < 0.05 * std, name


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (1, 2)])
def test_estimates_of_another_shape_are_refused(shape):
    """They would be broadcast."""
    table = solvers.ddim(grids.uniform(SCHEDULES["cosine"], 2))
    keys = image_keys(0, np.arange(3))
    with pytest.raises(ValueError, match=r"the shape of its input, \(3, 2\), got"):
        sample(lambda x, level: np.zeros(shape), table, keys, (2,))
