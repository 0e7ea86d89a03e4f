"""Solvers, against what is known exactly: flows of mixtures, moments of Gaussians, points."""

from functools import partial
from itertools import pairwise

import jax
import numpy as np
import pytest
from cases import SCHEDULES
from mixture import MIXTURE, P, at, moments, quantile, run
from solver_cases import ALL, DETERMINISTIC, SPECIAL, STOCHASTIC

from diffusion import schedules
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids, solvers
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample
from diffusion.sampling.solvers.dpm_solver import multistep, singlestep
from diffusion.sampling.solvers.predictor_corrector import stochastic_adams


@jax.jit
def run_gaussian(solver, keys, x):
    """x [B, 1] along the table for x_0 ~ N(0.7, 0.5^2)."""
    return sample(gaussian_mixture([[0.7]], 0.5), solver, keys, (1,), x_init=x)


exact_denoise = jax.jit(MIXTURE)


NOISE_PREDICTION_SDES = [
    name for name in STOCHASTIC if name in ("dpm_solver-1.0", "_stochastic_adams-1.0-3-3-eps")
]  # between the ends their noise is right only in the limit of many steps


@pytest.mark.parametrize("schedule", ["vp_sde", "edm", "rectified_flow", "sub_vp_sde"])
@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_moments_of_a_gaussian_converge(name, schedule):
    m, s, errors = 0.7, 0.5, []
    schedule = SCHEDULES[schedule]
    for steps in [60, 240]:
        grid = NoiseLevel(*(a[:-1] for a in grids.karras(schedule, steps + 1)))
        mean, variance = moments(ALL[name](grid, schedule), m, s)
        end = at(grid, -1)
        errors.append(
            abs(mean - end.alpha * m) + abs(variance - (end.alpha * s) ** 2 - end.sigma**2)
        )
    assert errors[1] < 0.03 and errors[1] < max(0.4 * errors[0], 1e-9), errors


@pytest.mark.parametrize("schedule", ["cosine", "zero_terminal_snr", "rectified_flow", "edm"])
@pytest.mark.parametrize("name", NOISE_PREDICTION_SDES)
def test_noise_prediction_ends_clean(name, schedule):
    """Also from alpha = 0 and from a huge ratio, in the steps that other solvers take there."""
    grid = grids.karras if schedule == "edm" else grids.uniform
    table = ALL[name](grid(SCHEDULES[schedule], 60), SCHEDULES[schedule])
    mean, variance = moments(table, 0.7, 0.0)
    np.testing.assert_allclose([mean, variance], [0.7, 0], atol=1e-6)
    mean, variance = moments(table, 0.7, 0.5)
    assert mean == pytest.approx(0.7, abs=0.03) and np.sqrt(variance) == pytest.approx(0.5, 0.1)


@pytest.mark.parametrize("steps", [5, 10, 20, 60])
@pytest.mark.parametrize("name", NOISE_PREDICTION_SDES)
def test_noise_prediction_is_stable_in_long_steps(name, steps):
    """Few steps of an SDE may lose variance, as those of ``ddpm``, but never make it."""
    for schedule in SCHEDULES.values():
        for grid in (grids.uniform, grids.linspace, grids.karras, grids.beta):
            grid = grid(schedule, steps)
            _, variance = moments(ALL[name](grid, schedule), 0.0, 0.5)
            assert np.sqrt(variance) < 0.52, (schedule, grid)
            assert moments(ALL[name](grid, schedule), 0.7, 0.0)[1] < 1e-9


@pytest.mark.parametrize("gamma, steps, std", [(0.0, 10, 0.370), (0.0, 40, 0.465), (0.3, 40, 0.43)])
def test_tcd_on_a_shifted_flow(gamma, steps, std):
    schedule = SCHEDULES["shifted_flow"]
    grid = grids.uniform(schedule, steps)
    table = solvers.tcd(grid, schedule, gamma=gamma)
    if gamma == 0:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-7), table, solvers.ddim(grid))
    _, variance = moments(table, 0.0, 0.5)
    assert np.sqrt(variance) == pytest.approx(std, abs=0.01)


def test_stages_between_the_nodes_of_a_shifted_flow_lie_between_them():
    schedule = SCHEDULES["shifted_flow"]
    grid = grids.uniform(schedule, 8)
    ratio = solvers.pndm(grid, schedule).level.ratio  # the first step has no signal to start from
    for i, (now, after) in enumerate(pairwise(grid.ratio[1:4])):
        assert np.all((after < ratio[2 + 4 * i : 4 + 4 * i]) & (ratio[2 + 4 * i : 4 + 4 * i] < now))


@pytest.mark.parametrize(
    "solver",
    ["dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "sa_solver", "dpmpp_3s"],
)
def test_jumps_of_lambda_lower_the_order_on_demand(solver):
    """``leading`` ends with steps many times as long as those before."""
    grid = grids.leading(SCHEDULES["linear"], 40)
    with_it, without = (
        np.sqrt(moments(getattr(solvers, solver)(grid, jump=jump), 0.0, 0.5)[1])
        for jump in (2.0, np.inf)
    )
    assert with_it == pytest.approx(0.5, abs=0.045) and abs(without - 0.5) > 0.02
    even = grids.exponential(SCHEDULES["linear"], 40)
    same = [getattr(solvers, solver)(even, jump=jump) for jump in (2.0, np.inf)]
    jax.tree.map(np.testing.assert_array_equal, *same)


JUMPING = {
    **{name: getattr(solvers, name) for name in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_3s")},
    **{f"dpm_solver-{k}": partial(solvers.dpm_solver, order=k) for k in (2, 3)},
    "dpm_solver_singlestep": solvers.dpm_solver_singlestep,
    **{f"unipc-{k}": partial(solvers.unipc, order=k) for k in (2, 3, 4)},
    **{f"unipc-{k}-eps": partial(solvers.unipc, order=k, prediction="eps") for k in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", JUMPING)
def test_with_jump_no_order_is_worse_than_the_first_on_ill_spaced_grids(name):
    for schedule in ("linear", "zero_terminal_snr", "edm", "rectified_flow", "shifted_flow"):
        for steps in (10, 40):
            grid = grids.linspace(SCHEDULES[schedule], steps)
            errors = [
                abs(np.sqrt(moments(table, 0.0, 0.5)[1]) - 0.5)
                for table in (JUMPING[name](grid, jump=2.0), solvers.ddim(grid))
            ]
            assert errors[0] < errors[1] + 1e-3, (schedule, steps, errors)


def test_jumps_count_on_the_way_up_too():
    grid = grids.leading(SCHEDULES["linear"], 40)
    grid = NoiseLevel(*(leaf[-2::-1] for leaf in grid))
    orders = [max(np.flatnonzero(A[0])) + 1 for A in multistep(grid, 3, rising=True, jump=2.0).A]
    assert orders[1] == 2 and max(orders) == 3  # each step is shorter than the one before


@pytest.mark.parametrize(
    "make",
    [
        lambda grid: solvers.deis(grid, orders=(1, 2)),
        lambda grid: solvers.unipc(grid, orders=(1,)),
        lambda grid: solvers.unipc(grid, corrected=(True,)),
        lambda grid: solvers.unipc(grid, orders=3),
        lambda grid: multistep(grid, 2, orders=(1, 2)),
        lambda grid: singlestep(grid, 2, orders=(1, 2)),
        lambda grid: stochastic_adams(grid, [1.0], [1] * 5, [1] * 5),
        lambda grid: stochastic_adams(grid, [1.0] * 5, [1], [1] * 5),
        lambda grid: solvers.dpmpp_2m(grid, jump=0.0),
    ],
)
def test_options_of_each_step(make):
    with pytest.raises(ValueError, match=r"must have 5 entries|jump must be positive"):
        make(grids.uniform(SCHEDULES["cosine"], 5))


@pytest.mark.parametrize(
    "name", [n for n in [*DETERMINISTIC, *STOCHASTIC] if n not in NOISE_PREDICTION_SDES]
)
def test_a_point_has_the_schedules_marginal_at_every_step(name):
    """With x_0 = m known, x_t ~ N(alpha m, sigma^2) exactly, after any number of steps."""
    for schedule in SCHEDULES.values():
        grid = grids.uniform(schedule, 6)
        for steps in [1, 3, 6]:
            part = NoiseLevel(*(a[: steps + 1] for a in grid))
            mean, variance = moments(ALL[name](part, schedule), 0.7, 0.0)
            np.testing.assert_allclose(mean, part.alpha[-1] * 0.7, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(variance, part.sigma[-1] ** 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SPECIAL)
def test_few_step_solvers_end_at_a_point(name):
    schedule = schedules.scaled_linear()
    for steps in [1, 4]:
        mean, variance = moments(ALL[name](grids.uniform(schedule, steps), schedule), 0.7, 0.0)
        np.testing.assert_allclose([mean, variance], [0.7, 0], atol=2e-3)  # LCM's c_skip > 0


@pytest.mark.parametrize(
    "name",
    ["ddim", "heun", "edm-10.0-0.05-20.0-1.0", "ddpm", "dpmpp_sde", "sa_solver", "ddpm_large"],
)
def test_samples_have_the_moments_of_the_table(name):
    """The engine applies the table, noise included: Monte Carlo against the exact recursion."""
    m, s, count = 0.7, 0.5, 20_000
    schedule = schedules.cosine()
    two_stages = name in ("heun", "edm-10.0-0.05-20.0-1.0", "dpmpp_sde")
    times = np.linspace(0.95, 0.05, 5 if two_stages else 9)
    table = ALL[name](grids.from_times(schedule, times), schedule)
    keys = image_keys(3, np.arange(count))
    first = at(table.level, 0)
    std = np.hypot(first.alpha * s, first.sigma)
    start = first.alpha * m + std * jax.vmap(lambda k: jax.random.normal(k, (1,)))(keys)
    end = run_gaussian(table, keys, start)
    mean, variance = moments(table, m, s)
    error = np.sqrt(variance / count)
    assert abs(end.mean() - mean) < 4 * error
    assert abs(end.var() / variance - 1) < 4 * np.sqrt(2 / count)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm_and_ancestral(name):
    grid = grids.uniform(SCHEDULES[name], 7)
    ddim, ddpm = solvers.ddim(grid, eta=1.0), solvers.ddpm(grid)
    for other in [ddpm, solvers.euler_ancestral(grid)]:
        np.testing.assert_allclose(other.A, ddim.A, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(other.b, ddim.b, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(other.noise, ddim.noise, rtol=1e-9, atol=1e-12)


def test_clipped_ddim_follows_the_clipped_estimate_unless_told_otherwise():
    """As Euler does; with keep_eps, eps is the network's own."""
    grid = grids.uniform(schedules.cosine(), 5)
    for keep_eps in [False, True]:
        table = solvers.ddim(grid, keep_eps=keep_eps)
        assert np.any(table.b_raw[:-1]) == keep_eps
        np.testing.assert_allclose(table.b + table.b_raw, solvers.euler(grid).b, atol=1e-12)


def test_ddpm_variances_are_the_papers():
    table = schedules.linear()
    betas = 1 - np.append(table.alphas[0], table.alphas[1:] / table.alphas[:-1]) ** 2
    small = solvers.ddpm(grids.uniform(table, 1000))
    large = solvers.ddpm_large(grids.uniform(table, 1000))
    bar = table.alphas**2
    beta_tilde = (betas[1:] * (1 - bar[:-1]) / (1 - bar[1:]))[::-1]
    np.testing.assert_allclose(small.noise[:-1, 0] ** 2, beta_tilde, rtol=1e-8)
    np.testing.assert_allclose(large.noise[:-1, 0] ** 2, betas[:0:-1], rtol=1e-8)
    np.testing.assert_array_equal(small.noise_upper, large.noise)
    assert small.noise[-1].max() == large.noise[-1].max() == 0


@pytest.mark.parametrize("name", ALL)
def test_tables_are_finite_and_never_evaluate_clean_data(name):
    for schedule in SCHEDULES.values():
        grid = grids.uniform(schedule, 5)
        table = ALL[name](grid, schedule)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(table))
        assert np.all(table.level.sigma > 0)
        if table.level.alpha[0] == 0:  # what is multiplied by x, of variance 1, and by D
            assert np.abs(table.A[0]).max() < 10 and np.abs(table.b[0]).max() < 10


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_starts_without_signal(name):
    """At alpha = 0, where x is pure noise, every solver still follows the exact flow."""
    for schedule in [schedules.RectifiedFlow(), SCHEDULES["zero_terminal_snr"]]:
        with jax.enable_x64(True):
            grid = grids.from_times(schedule, np.linspace(1, 0.1, 65))
            end = run(ALL[name](grid, schedule), quantile(P, at(grid, 0)))
            exact = quantile(P, at(grid, -1))
        np.testing.assert_allclose(end, exact, atol=0.06)


@pytest.mark.parametrize("schedule", ["linear", "vp_sde"])
@pytest.mark.parametrize("name", [n for n in ALL if n not in ("lcm", "tcd", "pndm", "ddpm_large")])
def test_sigma_space_is_the_same(name, schedule):
    """x / alpha on sigma / alpha, as k-diffusion computes, gives the same samples."""
    schedule = SCHEDULES[schedule]
    with jax.enable_x64(True):
        grid = grids.from_times(schedule, np.linspace(1, 0.01, 33))
        in_sigma = NoiseLevel(grid.ratio, np.ones_like(grid.alpha), grid.ratio)
        x = np.linspace(-2, 2, 21)[:, None]
        end = run(ALL[name](grid, schedule), x)
        same = run(ALL[name](in_sigma, schedules.EDM(1e9)), x / grid.alpha[0])
    np.testing.assert_allclose(np.asarray(end) / grid.alpha[-1], same, rtol=1e-12, atol=1e-12)


def test_heun_and_2m_are_the_papers_loops():
    """EDM's algorithm 1 and k-diffusion's 2M written as their loops, on sigma = t."""
    grid = grids.karras(schedules.EDM(), 32)
    sigma, x0 = grid.sigma, np.linspace(-90, 90, 21)[:, None]

    def denoise(x, s):
        return np.asarray(exact_denoise(x, NoiseLevel(s, 1.0 + 0 * s, s)))

    with jax.enable_x64(True):
        x = x0
        for s, s_next in pairwise(sigma):
            d = (x - denoise(x, s)) / s
            y = x + (s_next - s) * d
            if s_next > 0:
                y = x + (s_next - s) * (d + (y - denoise(y, s_next)) / s_next) / 2
            x = y
        np.testing.assert_allclose(run(solvers.heun(grid), x0), x, atol=1e-11)

        x, old = x0, None
        for i, (s, s_next) in enumerate(pairwise(sigma)):
            D = denoise(x, s)
            if old is None or s_next == 0:
                mix = D
            else:
                ratio = np.log(sigma[i - 1] / s) / np.log(s / s_next)
                mix = (1 + 1 / (2 * ratio)) * D - old / (2 * ratio)
            x, old = s_next / s * x + (1 - s_next / s) * mix, D
        np.testing.assert_allclose(run(solvers.dpmpp_2m(grid), x0), x, atol=1e-11)


def test_flow_heun_is_heun_on_the_velocity():
    grid = grids.uniform(schedules.RectifiedFlow(), 32)
    x0 = np.linspace(-2, 2, 21)[:, None]

    def velocity(x, t):
        D = np.asarray(exact_denoise(x, NoiseLevel(t, 1 - t, t)))
        return (x - D) / t  # eps - D

    with jax.enable_x64(True):
        x = x0
        for t, t_next in pairwise(grid.t):
            v = velocity(x, t)
            y = x + (t_next - t) * v
            x = x + (t_next - t) * (v + velocity(y, t_next)) / 2 if t_next > 0 else y
        np.testing.assert_allclose(run(solvers.flow_heun(grid), x0), x, atol=1e-12)


def test_number_of_evaluations():
    grid = grids.uniform(schedules.cosine(), 7)
    part = grids.from_times(schedules.cosine(), [1, 0.6, 0.2])  # does not end clean
    assert solvers.ddim(grid).evaluations == solvers.dpmpp_2m(grid).evaluations == 7
    assert solvers.heun(grid).evaluations == solvers.flow_heun(grid).evaluations == 13
    assert solvers.heun(part).evaluations == 4


def test_initial_noise_is_unit_datas_marginal():
    assert np.isclose(solvers.ddim(grids.uniform(schedules.linear(), 3)).init, 1)
    assert np.isclose(solvers.heun(grids.uniform(schedules.EDM(), 3)).init, np.hypot(1, 80))


GRID = grids.uniform(schedules.RectifiedFlow(), 4)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (NoiseLevel(*(a[::-1] for a in GRID)), "noisiest first; node 0"),
        (NoiseLevel(*(a[:1] for a in GRID)), "N >= 1"),
        (GRID._replace(alpha=GRID.alpha[:-1]), "leaves"),
        (GRID._replace(sigma=GRID.sigma * np.nan), "finite"),
        (GRID._replace(sigma=-GRID.sigma), ">= 0"),
    ],
)
def test_bad_grids(grid, message):
    for solver in ALL.values():
        with pytest.raises(ValueError, match=message):
            solver(grid, schedules.RectifiedFlow())


def test_bad_eta():
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        solvers.ddim(GRID, eta=1.5)


@pytest.mark.parametrize("name", [name for name in ALL if name[0] != "_"])
def test_sigmas_are_no_grid(name):
    """What k-diffusion's samplers take is named, with the function that makes a grid of it."""
    for sigmas in (np.array([3.0, 1.0, 0.5, 0.0]), [3.0, 1.0, 0.0]):
        with pytest.raises(ValueError, match=r"a grid is a NoiseLevel.*grids\.from_sigmas"):
            ALL[name](sigmas, SCHEDULES["vp_sde"])
