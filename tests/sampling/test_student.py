"""Learned solvers: members of the family, exactness, and that learning helps on unseen noise."""

import jax
import numpy as np
import pytest
from cases import SCHEDULES
from mixture import MIXTURE

from diffusion import schedules
from diffusion.conditioning import Conditioning
from diffusion.sampling import grids, solvers
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import sample
from diffusion.sampling.solvers import table_file
from diffusion.sampling.student import Coefficients, Student, build, coefficients

START = [solvers.ddim, solvers.dpmpp_2m, solvers.dpmpp_3m]


@pytest.mark.parametrize(
    "name", ["scaled_linear", "vp_sde", "edm", "rectified_flow", "shifted_flow"]
)
@pytest.mark.parametrize("start", START)
def test_starts_where_the_solver_is(start, name):
    schedule = SCHEDULES[name]
    solver = start(grids.uniform(schedule, 6))
    with jax.enable_x64(True):
        same = build(coefficients(solver, schedule), schedule, schedule.t_max)
    np.testing.assert_allclose(same.level.t, solver.level.t, rtol=1e-12)
    np.testing.assert_allclose(same.A[:, 0], solver.A[:, 0], atol=1e-9)
    np.testing.assert_allclose(same.b[:, 0], (solver.b + solver.b_raw)[:, 0], atol=1e-9)


def test_points_are_exact_whatever_was_learned():
    schedule = schedules.RectifiedFlow()
    rng = np.random.default_rng(0)
    random = Coefficients(rng.normal(size=5), rng.normal(size=(5, 3)))
    point = gaussian_mixture([[0.7]])
    with jax.enable_x64(True):
        solver = build(random, schedule, 1.0)
        keys = jax.random.split(jax.random.key(0), 4)
        end = sample(point, solver, keys, (1,))
    np.testing.assert_allclose(end, 0.7, rtol=1e-12)


def test_learning_helps_on_noise_not_seen():
    schedule = schedules.cosine()
    grid = grids.karras(schedule, 4)
    student = Student(lambda weights, cond: MIXTURE, None)
    teacher = solvers.dpmpp_2m(grids.karras(schedule, 60))
    options = dict(batch_size=128, progress=False)
    lessons, held_out = student.lessons(teacher, Conditioning(), 384, (1,), **options).split(256)
    start = solvers.dpmpp_2m(grid)
    result = student.learn(schedule, start, lessons, held_out, iterations=150, **options)
    before, best = result.history[0][1], min(error for _, error in result.history)
    assert np.isclose(student.error(start, held_out), before, rtol=1e-4)
    assert np.isclose(student.error(result.solver, held_out), best, rtol=1e-4)
    fresh = student.lessons(teacher, Conditioning(), 128, (1,), seed=1, **options)
    assert student.error(result.solver, fresh) < 0.6 * student.error(start, fresh)
    assert best < 0.5 * before, (before, best)
    assert result.history[0][0] == 0 and result.history[-1][0] == 150
    assert result.solver.evaluations == 4 and np.all(np.diff(result.solver.level.t) < 0)
    assert np.isclose(result.solver.level.t[0], grid.t[0])


def test_a_table_can_be_kept(tmp_path):
    grid = grids.uniform(schedules.cosine(), 4)
    table = solvers.dpmpp_3m(grid)
    table_file.save(tmp_path / "table.npz", table)
    again = solvers.from_file(grid, path=str(tmp_path / "table.npz"))
    jax.tree.map(np.testing.assert_array_equal, again, table)
    with pytest.raises(ValueError, match=r"has 4 evaluations.*set steps=4"):
        solvers.from_file(grids.uniform(schedules.cosine(), 5), path=str(tmp_path / "table.npz"))
    np.savez(tmp_path / "other.npz", x=1)
    with pytest.raises(ValueError, match="not a solver's table: it has no level_t"):
        table_file.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (solvers.ddpm, "deterministic"),
        (solvers.heun, "one evaluation a step"),
        (solvers.lms, "combines estimates of x_0"),
    ],
)
def test_what_cannot_be_learned_from(solver, message):
    schedule = schedules.cosine()
    with pytest.raises(ValueError, match=message):
        coefficients(solver(grids.uniform(schedule, 5)), schedule)
