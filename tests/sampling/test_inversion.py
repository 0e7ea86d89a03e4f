"""Inversion: orders of convergence, exact return, diffusers' scheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SCHEDULES
from mixture import MIXTURE, P, at, quantile, run

from diffusion import schedules
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids, inversion, solvers
from diffusion.sampling.inversion import invert

X0 = np.linspace(-1.5, 1.5, 21)[:, None]


@jax.jit
def up(table, x):
    return invert(MIXTURE, table, x)


PATHS = {
    "vp": (schedules.VPSDE(), np.linspace(0.9, 0.1, 65)),
    "flow": (schedules.RectifiedFlow(), np.linspace(1, 0.1, 65)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("inverse", "solver", "order"),
    [
        (inversion.euler, solvers.ddim, 1),
        (inversion.ddim, solvers.ddim, 1),
        (inversion.heun, solvers.flow_heun, 3),  # 2, and what the two ways have in common
        (inversion.fixed_point, solvers.ddim, 2),
        (lambda grid: inversion.fixed_point(grid, 2), solvers.ddim, 3),
    ],
    ids=["euler", "ddim", "heun", "fixed_point", "fixed_point_2"],
)
def test_order_of_the_way_there_and_back(inverse, solver, order, path):
    schedule, times = PATHS[path]
    if inverse is inversion.ddim:  # which is of no use at alpha = 0
        times = times[4:]
    errors = []
    with jax.enable_x64(True):
        for every in (2, 1):
            grid = grids.from_times(schedule, times[::every])
            errors.append(np.abs(run(solver(grid), up(inverse(grid), X0)) - X0).max())
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.4, errors


@pytest.mark.parametrize("inverse", [inversion.euler, inversion.heun, inversion.fixed_point])
def test_follows_the_probability_flow(inverse):
    errors = []
    with jax.enable_x64(True):
        for steps in (32, 64):
            grid = grids.from_times(schedules.RectifiedFlow(), np.linspace(0.95, 0.1, steps + 1))
            noise = up(inverse(grid), quantile(P, at(grid, -1)))
            errors.append(np.abs(noise - quantile(P, at(grid, 0))).max())
    assert errors[1] < (0.3 if inverse is inversion.heun else 0.6) * errors[0], errors
    assert errors[1] < 0.05


@pytest.mark.parametrize("name", SCHEDULES)
def test_fixed_point_undoes_ddim_from_clean_data_on(name):
    """On any schedule, with a clean end and, where there is one, a start at alpha = 0."""
    x0 = X0 / 2
    with jax.enable_x64(True):
        grid = grids.karras(SCHEDULES[name], 16, sigma_min=0.05, sigma_max=8.0)
        if SCHEDULES[name](SCHEDULES[name].t_max).alpha == 0:
            noisiest = SCHEDULES[name](np.float64(SCHEDULES[name].t_max))
            grid = NoiseLevel(*(np.append(top, leaf[1:]) for top, leaf in zip(noisiest, grid)))
        noise = up(inversion.fixed_point(grid, 40), x0)
        back = run(solvers.ddim(grid), noise)
    np.testing.assert_allclose(back, x0, atol=1e-6)
    assert np.abs(noise - x0).max() > 0.3


def test_better_than_ddims_inversion_at_the_same_cost():
    """The more evaluations, the nearer; with one a step already nearer than DDIM's inversion."""
    grid = grids.uniform(schedules.cosine(), 32)

    def error(table):
        return float(np.abs(run(solvers.ddim(grid), up(table, X0)) - X0).mean())

    with jax.enable_x64(True):
        errors = [error(inversion.fixed_point(grid, k)) for k in (1, 2, 4)]
        assert error(inversion.ddim(grid)) > errors[0] > errors[1] > errors[2], errors


def test_number_of_evaluations():
    grid, part = grids.uniform(schedules.cosine(), 6), schedules.cosine()(np.array([0.9, 0.5, 0.1]))
    counts = [f(grid).evaluations for f in (inversion.euler, inversion.heun, inversion.ddim)]
    assert counts == [5, 10, 6]
    assert inversion.fixed_point(grid, 3).evaluations == 18
    assert inversion.euler(part).evaluations == inversion.fixed_point(part).evaluations == 2


@pytest.mark.parametrize("inverse", [inversion.euler, inversion.heun, inversion.fixed_point])
def test_tables_are_finite_and_never_evaluate_clean_data(inverse):
    for schedule in SCHEDULES.values():
        grid = grids.uniform(schedule, 5)
        table = inverse(grid)
        assert np.all(table.level.sigma > 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(table))


@pytest.mark.parametrize("inverse", [inversion.euler, inversion.heun])
def test_of_a_point_the_noise_is_kept(inverse):
    grid = grids.from_times(schedules.cosine(), np.linspace(0.9, 0.2, 6))
    m, eps = 0.7, np.linspace(-1, 1, 21)[:, None]
    with jax.enable_x64(True):
        start = grid.alpha[-1] * m + grid.sigma[-1] * eps
        end = invert(lambda x, level: m + 0 * x, inverse(grid), jnp.asarray(start))
    np.testing.assert_allclose(end, grid.alpha[0] * m + grid.sigma[0] * eps, atol=1e-10)


def test_ddim_is_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.DDIMInverseScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        set_alpha_to_one=True,
        clip_sample=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(20)
    x = torch.tensor(X0)
    for t in scheduler.timesteps:
        eps = torch.tanh(x) * (1 + t / 1000)
        x = scheduler.step(eps, int(t), x).prev_sample

    def denoise(x, level):
        eps = jnp.tanh(x) * (1 + (1000 * level.t - 1) / 1000)
        return (x - level.sigma * eps) / level.alpha

    with jax.enable_x64(True):
        grid = grids.leading(schedules.linear(), 20)
        end = invert(denoise, inversion.ddim(grid), jnp.asarray(X0))
    np.testing.assert_allclose(end, x.numpy(), rtol=2e-4, atol=2e-4)


def test_errors():
    one = grids.uniform(schedules.RectifiedFlow(), 1)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        inversion.fixed_point(one, 0)
    with pytest.raises(ValueError, match="keeps nothing of the picture"):
        inversion.fixed_point(one)
    with pytest.raises(ValueError, match="one step to clean data"):
        inversion.euler(one)
