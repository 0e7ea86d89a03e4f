"""Networks that are told where they aim are told right, row by row."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.conditioning import Conditioning
from diffusion.sampling import grids, solvers
from diffusion.sampling.aims import aimed, aims
from diffusion.sampling.sample import image_keys, sample

FLOW, COSINE = schedules.RectifiedFlow(), schedules.cosine()


def fractions(level):
    return np.asarray(level.sigma / (level.alpha + level.sigma))


@pytest.mark.parametrize("schedule", [FLOW, COSINE, schedules.EDM()])
def test_steps_go_to_the_next_node(schedule):
    grid = grids.uniform(schedule, 5)
    expected = fractions(grid)[1:]
    for make in (solvers.euler, solvers.ddim):
        np.testing.assert_allclose(aims(make(grid))[1], expected, atol=1e-6)
    np.testing.assert_allclose(aims(solvers.consistency(grid, sigma_min=0.0))[1], 0, atol=1e-7)


def test_tcd_goes_below_the_next_node():
    grid = grids.uniform(COSINE, 4)
    below = COSINE(0.7 * COSINE.argument(grid))
    expected = fractions(below)[1:]
    np.testing.assert_allclose(aims(solvers.tcd(grid, COSINE, 0.3))[1], expected, atol=1e-6)
    stochastic = aims(solvers.ddpm(grid))[1]
    assert (stochastic[:-1] < fractions(grid)[1:-1]).all() and stochastic[-1] < 1e-6


def test_a_solver_with_memory_is_refused():
    with pytest.raises(ValueError, match="without memory: euler, ddim, consistency, lcm or tcd"):
        aims(solvers.dpmpp_2m(grids.uniform(COSINE, 4)))


def test_each_call_is_told_its_own_aim():
    seen, solver = [], solvers.euler(grids.from_times(FLOW, (1.0, 0.6, 0.25, 0.0)))

    def denoise(x, level, cond):
        seen.append(cond.span)
        return x * 0 + cond.span[:, None]

    cond = Conditioning()
    made = aimed(denoise, *aims(solver))
    _, path = sample(
        lambda x, level: made(x, level, cond),
        solver,
        image_keys(0, range(3)),
        (2,),
        trajectory=True,
    )
    np.testing.assert_allclose(
        path.x0[:, :, 0], np.repeat([[0.4], [0.35], [0.25]], 3, 1), atol=1e-6
    )
    assert jnp.shape(seen[0]) == (3,)
