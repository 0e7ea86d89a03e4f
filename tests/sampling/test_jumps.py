"""Paths that go back up: exact on points, converging on Gaussians, the papers' order of visits."""

import jax
import numpy as np
import pytest
from cases import SCHEDULES
from mixture import MIXTURE, at, moments

from diffusion import schedules, specs
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids, solvers
from diffusion.sampling.editing import inpaint, noised
from diffusion.sampling.sample import image_keys, sample
from diffusion.sampling.solvers.restart import jumps

FLOW, EDM = schedules.RectifiedFlow(), schedules.EDM()


BASES = ["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_2m_sde", "edm(s_noise=1.0)", "ddim(eta=0.5)"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["linear", "edm", "rectified_flow", "sub_vp_sde"])
def test_a_point_keeps_the_schedules_marginal(base, name):
    """Up and down, x_t ~ N(alpha m, sigma^2) exactly; also where the grid ends with noise."""
    schedule = SCHEDULES[name]
    grid = grids.uniform(schedule, 9)
    top = 0.3 * float(min(grid.ratio[1], 1e3))
    for end in (7, 9):
        part = NoiseLevel(*(leaf[: end + 1] for leaf in grid))
        tables = [solvers.repaint(part, schedule, base, jump_length=3, resamples=3)]
        low = float(part.ratio[end - 2])
        tables.append(solvers.restart(part, schedule, base, low, max(top, 2 * low), 2, 3))
        for table in tables:
            mean, variance = moments(table, 0.7, 0.0)
            np.testing.assert_allclose(mean, part.alpha[-1] * 0.7, rtol=1e-9)
            np.testing.assert_allclose(variance, part.sigma[-1] ** 2, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize(
    "solver",
    [
        lambda n: solvers.restart(grids.karras(EDM, n), EDM, "heun", 0.06, 0.3, 3, n // 20),
        lambda n: solvers.restart(
            grids.uniform(FLOW, n), FLOW, "flow_heun", (0.1, 1.0), (0.5, 4.0), 2, n // 20
        ),
        lambda n: solvers.repaint(grids.uniform(FLOW, n), FLOW, "ddpm", n // 10, 3),
    ],
)
def test_moments_of_a_gaussian_converge(solver):
    errors = []
    for n in [40, 160]:
        mean, variance = moments(solver(n), 0.7, 0.5)
        errors.append(abs(mean - 0.7) + abs(variance - 0.25))
    assert errors[1] < 0.02 and errors[1] < 0.4 * errors[0], errors


def test_is_the_loop():
    """Down by DDIM, up by the forward process, on a mixture: with the noise of the row before."""
    path = schedules.cosine()(np.array([0.9, 0.5, 0.8, 0.4, 0.0, 0.3, 0.6, 0.2, 0.1]))
    noises = np.random.default_rng(0).standard_normal((8, 5, 1))
    x = noises[0]
    with jax.enable_x64(True):
        table = jumps(path, solvers.ddim)
        end = sample(MIXTURE, table, image_keys(0, range(5)), (1,), x_init=x, noises=noises)
        row = 0
        for i in range(8):
            now, after = at(path, i), at(path, i + 1)
            scale = after.alpha / now.alpha
            if now.ratio > after.ratio:
                D = np.asarray(MIXTURE(x, now))
                x = after.alpha * D + after.sigma * (x - now.alpha * D) / now.sigma
                row += 1
            else:
                z = noises[row] if i != 5 else 0  # the second of two rises
                if i == 4:
                    after, scale = at(path, 6), path.alpha[6]
                if i != 5:
                    x = scale * x + np.sqrt(after.sigma**2 - (scale * now.sigma) ** 2) * z
        np.testing.assert_allclose(end, x, atol=1e-12)
    assert table.evaluations == row == 5


def repaint_times(total, jump_length, resamples):
    """The paper's loop over time indices (its figure 9): jumps left, counted down at each."""
    left = {t: resamples - 1 for t in range(0, total - jump_length, jump_length)}
    t, visited = total, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            t += jump_length
            visited.append(t)
    return visited


@pytest.mark.parametrize(("total", "length", "resamples"), [(250, 10, 10), (13, 4, 3), (8, 7, 2)])
def test_repaint_visits_what_the_papers_loop_visits(total, length, resamples):
    grid = grids.uniform(schedules.linear(), total)
    solver = solvers.repaint(grid, schedules.linear(), "ddim", length, resamples)
    visited = repaint_times(total, length, resamples)
    # An evaluation is wherever the next index is smaller.
    down = [t for t, after in zip(visited, [*visited[1:], -1]) if after < t]
    np.testing.assert_allclose(solver.level.t, grid.t[::-1][np.array(down) + 1])


def test_number_of_evaluations():
    table = schedules.linear()
    assert solvers.repaint(grids.uniform(table, 250), table).evaluations == 2410
    assert solvers.restart(grids.karras(EDM, 18), EDM).evaluations == 43
    imagenet = dict(
        low=(19.35, 1.09, 0.59, 0.30, 0.06),
        high=(40.79, 1.92, 1.09, 0.59, 0.30),
        repeats=(1, 1, 5, 5, 6),
        steps=(3, 3, 3, 3, 5),
    )
    solver = solvers.restart(grids.karras(EDM, 36), EDM, **imagenet)
    assert solver.evaluations == 203
    assert np.isclose(solver.level.ratio, 40.79).sum() == 1
    assert np.isclose(solver.level.ratio, 0.59, rtol=1e-9).sum() == 5


def test_without_repetition_it_is_the_base():
    grid = grids.uniform(FLOW, 7)
    for once, base in [
        (solvers.repaint(grid, FLOW, jump_length=2, resamples=1), solvers.ddpm(grid)),
        (jumps(grid, solvers.dpmpp_2m), solvers.dpmpp_2m(grid)),
    ]:
        jax.tree.map(np.testing.assert_array_equal, once, base)


def test_bounds_of_learned_variances_are_composed():
    grid = grids.uniform(schedules.linear(), 9)
    learned = solvers.repaint(grid, schedules.linear(), "ddpm", 3, 2)
    large = solvers.repaint(grid, schedules.linear(), "ddpm_large", 3, 2)
    np.testing.assert_array_equal(learned.noise_upper, large.noise)
    assert (learned.noise_upper > learned.noise).any()


def test_on_the_command_line():
    context = {"schedule": FLOW}
    text = "repaint(base='tcd(gamma=0.5)', jump_length=2, resamples=3)"
    solver = specs.function(text, solvers.CHOICES, "config.sampler.solver", context)
    assert solver(grids.uniform(FLOW, 7)).evaluations == 7 + 3 * 2 * 2
    text = "restart(low=(0.1, 1.0), high=(0.5, 4.0))"
    solver = specs.function(text, solvers.CHOICES, "config.sampler.solver", context)
    assert solver(grids.uniform(FLOW, 7)).evaluations == 13 + 2 * 8


GRID = grids.uniform(FLOW, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solvers.repaint(GRID, FLOW, jump_length=5), r"jump_length must lie in 1..4"),
        (lambda: solvers.repaint(GRID, FLOW, jump_length=2, resamples=0), "resamples must be at"),
        (lambda: solvers.repaint(GRID, FLOW, "dpm", 2), "Did you mean"),
        (lambda: solvers.restart(GRID, FLOW, low=1, high=0.1), "nearest to low=1"),
        (lambda: solvers.restart(GRID, FLOW, repeats=0), "repeats and steps must be at least 1"),
        (lambda: solvers.restart(grids.uniform(FLOW, 1), FLOW), "at least 2 steps"),
        (lambda: jumps(FLOW(np.array([0.9, 0.1, 0.5])), solvers.ddim), "end with a step down"),
        (lambda: jumps(FLOW(np.array([0.1, 0.5, 0.2])), solvers.ddim), "end with a step down"),
        (lambda: jumps(FLOW(np.array([0.9, 0.5, 0.5, 0])), solvers.ddim), "decrease strictly"),
        (
            lambda: solvers.restart(grids.karras(EDM, 5), EDM, high=100.0),
            "beyond the schedule's sigma_max",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_repaint_brings_the_painted_into_agreement_with_the_known():
    """Two correlated numbers, the first known: the second's mean should be rho times it."""
    rho, count = 0.9, 4000
    root, vectors = np.linalg.eigh([[1, rho], [rho, 1]])

    def denoise(x, level):
        gain = level.alpha * root / (level.alpha**2 * root + level.sigma**2)
        return (x @ vectors * gain) @ vectors.T

    mask, known = np.array([1.0, 0.0]), np.array([1.5, 0.0])
    keys = image_keys(0, range(count))

    @jax.jit
    def paint(table):
        x_init = noised(np.tile(np.float32(known), (count, 1)), table, keys)
        return sample(inpaint(denoise, known, mask), table, keys, (2,), x_init=x_init)

    grid = grids.uniform(FLOW, 20)
    once = paint(solvers.ddpm(grid))
    often = paint(solvers.repaint(grid, FLOW, jump_length=4, resamples=8))
    for x in (once, often):
        np.testing.assert_allclose(x[:, 0], 1.5, atol=1e-6)
    errors = [abs(float(x[:, 1].mean()) - rho * 1.5) for x in (once, often)]
    assert errors[1] < 0.25 * errors[0], errors
