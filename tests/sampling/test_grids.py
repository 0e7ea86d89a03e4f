"""Grids: their ends, their spacing, and what they refuse."""

import numpy as np
import pytest
from cases import SCHEDULES
from scipy import stats

from diffusion import schedules
from diffusion.sampling import grids

EVERY = [grids.uniform, grids.linspace, grids.karras, grids.exponential, grids.beta]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("grid", EVERY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_from_noisiest_to_clean_on_the_schedule(grid, schedule, steps):
    level = grid(schedule, steps)
    for leaf in level:
        assert leaf.shape == (steps + 1,) and leaf.dtype == np.float64
    assert np.all(np.diff(level.t) < 0)
    assert np.all(level.sigma[:-1] * level.alpha[1:] > level.sigma[1:] * level.alpha[:-1])
    assert (level.t[-1], level.alpha[-1], level.sigma[-1]) == (0, 1, 0)
    # Not schedule(level.t): a shifted flow's level carries the time of the flow it shifts.
    on_schedule = schedule(schedule.invert(level.alpha, level.sigma))
    for leaf, expected in zip(level, on_schedule):
        np.testing.assert_allclose(leaf, expected, rtol=1e-9, atol=1e-12)


def test_uniform_and_linspace_times():
    np.testing.assert_allclose(grids.uniform(schedules.EDM(8.0), 4).t, [8, 6, 4, 2, 0])
    np.testing.assert_allclose(
        grids.linspace(schedules.linear(steps=10), 4).t, [1, 0.7, 0.4, 0.1, 0]
    )
    flow = schedules.RectifiedFlow()
    np.testing.assert_allclose(grids.linspace(flow, 3, t_min=0.2).t, [1, 0.6, 0.2, 0])


def test_leading_is_stable_diffusions():
    table = schedules.scaled_linear()
    index = np.array([901, 801, 701, 601, 501, 401, 301, 201, 101, 1])
    level = grids.leading(table, 10, offset=1)
    np.testing.assert_allclose(level.t, np.append((index + 1) / 1000, 0))
    np.testing.assert_allclose(level.alpha[:-1], table.alphas[index], rtol=1e-13)
    np.testing.assert_allclose(grids.leading(table, 1000).t, np.linspace(1, 0, 1001), atol=1e-15)


def test_karras_is_equation_5():
    level = grids.karras(schedules.EDM(), 5)
    i = np.arange(5)
    sigma = (80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(level.sigma[:-1], sigma, rtol=1e-13)
    assert np.all(level.alpha == 1)


@pytest.mark.parametrize("grid", [grids.karras, grids.exponential], ids=lambda f: f.__name__)
def test_given_range_is_kept_in_ratio(grid):
    level = grid(schedules.cosine(), 6, sigma_min=0.03, sigma_max=14.0)
    np.testing.assert_allclose(level.ratio[[0, -2]], [14, 0.03], rtol=1e-14)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-13)
    if grid is grids.exponential:
        np.testing.assert_allclose(np.diff(np.log(level.ratio[:-1])), np.log(0.03 / 14) / 5)


def test_default_range():
    def ends(schedule):
        return grids.karras(schedule, 9).ratio[[0, -2]]

    table = schedules.scaled_linear()
    first, last = table.sigmas[[0, -1]] / table.alphas[[0, -1]]
    np.testing.assert_allclose(ends(table), [last, first], rtol=1e-12)
    np.testing.assert_allclose(ends(schedules.EDM(50.0)), [50, 0.002], rtol=1e-12)
    np.testing.assert_allclose(ends(schedules.RectifiedFlow()), [80, 0.002], rtol=1e-12)


def test_partial_grid():
    level = grids.from_times(schedules.RectifiedFlow(), [0.6, 0.4, 0.1])
    np.testing.assert_allclose(level.alpha, [0.4, 0.6, 0.9])


@pytest.mark.parametrize("grid", [grids.linspace, grids.karras, grids.exponential])
def test_ends_at_the_smallest_noise(grid):
    """N steps to the level before clean data are the first N of N + 1 steps."""
    for schedule in SCHEDULES.values():
        for steps in [1, 5]:
            ends, clean = grid(schedule, steps, clean=False), grid(schedule, steps + 1)
            assert len(ends.t) == steps + 1 and ends.sigma[-1] > 0
            for a, b in zip(ends, clean):
                np.testing.assert_array_equal(a, b[:-1])


def test_beta_spacing():
    flow = schedules.RectifiedFlow()
    np.testing.assert_allclose(grids.beta(flow, 5, a=1.0, b=1.0).t, np.linspace(1, 0, 6))
    t = grids.beta(schedules.EDM(), 40).t / 80
    np.testing.assert_allclose(stats.beta(0.6, 0.6).cdf(t), np.linspace(1, 0, 41), atol=1e-12)
    assert t[0] - t[1] < 0.01 < 0.02 < t[19] - t[20]  # crowded at the ends


def test_flow_shift_is_sd3s():
    t = np.linspace(1, 0, 8)
    level = grids.flow_shift(schedules.RectifiedFlow(), 7, shift=3.0)
    np.testing.assert_allclose(level.t, 3 * t / (1 + 2 * t), rtol=1e-12)
    np.testing.assert_allclose(level.sigma, level.t)
    trigonometric = grids.flow_shift(schedules.TrigonometricFlow(), 7, shift=2.0)
    ratio = schedules.TrigonometricFlow()(t).ratio
    np.testing.assert_allclose(trigonometric.ratio[1:], 2 * ratio[1:], rtol=1e-9)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63)])
def test_flow_shift_for_tokens_is_fluxs(tokens, mu):
    t = np.linspace(1, 0, 5)[:-1]
    level = grids.flow_shift_for(schedules.RectifiedFlow(), 4, tokens=tokens)
    np.testing.assert_allclose(level.t[:-1], np.exp(mu) / (np.exp(mu) + 1 / t - 1), rtol=1e-12)


TABLE, FLOW = schedules.linear(steps=10), schedules.RectifiedFlow()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *[(lambda g=g: g(TABLE, 0), "at least 1, got 0") for g in [*EVERY, grids.leading]],
        *[(lambda g=g: g(TABLE, 2.5), "whole number, got 2.5") for g in [*EVERY, grids.leading]],
        (lambda: grids.uniform(FLOW, True), "at least 1, got True"),
        (lambda: grids.leading(TABLE, 11), "11 is more than the 10"),
        (lambda: grids.linspace(TABLE, 11), "11 is more than the 10"),
        (lambda: grids.leading(TABLE, 3, offset=4), r"0\.\.3 for 3 of 10 steps, got 4"),
        (lambda: grids.leading(FLOW, 3), "uniform needs none"),
        (lambda: grids.linspace(FLOW, 3, t_min=0.0), "t_min must lie in"),
        (lambda: grids.karras(FLOW, 3, rho=0), "rho must be positive"),
        (lambda: grids.karras(FLOW, 3, sigma_min=2, sigma_max=1), "sigma_min < sigma_max"),
        (lambda: grids.karras(schedules.EDM(), 3, sigma_max=90), "90.0 lies beyond"),
        (lambda: grids.beta(FLOW, 3, a=0.0), "positive, got a=0.0"),
        (lambda: grids.flow_shift(TABLE, 3), "use schedule.shifted"),
        (lambda: grids.flow_shift(FLOW, 3, shift=-1.0), "positive, got -1.0"),
        (lambda: grids.flow_shift_for(FLOW, 3, tokens=0), "at least 1, got 0"),
        (lambda: grids.from_times(FLOW, [0.5]), "at least two"),
        (lambda: grids.from_times(FLOW, [1.5, 0.5]), r"in \[0, 1.0\]"),
        (lambda: grids.from_times(FLOW, [0.5, 0.7, 0.1]), "strictly, got 0.5 then 0.7"),
        (lambda: grids.from_sigmas(FLOW, [3, 3, 0]), "strictly, got 3.0 then 3.0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 50), (0.6, 30), (0.29, 14), (0.02, 1)])
def test_strength_is_counted_as_in_diffusers(strength, steps):
    """t_start = N - min(int(N s), N): what is left are the grid's last nodes."""
    grid = grids.uniform(schedules.cosine(), 50)
    part = grids.partial(grid, strength)
    for leaf, whole in zip(part, grid):
        np.testing.assert_array_equal(leaf, whole[50 - steps :])


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.5, 0.05])
def test_bad_strengths(strength):
    grid = grids.uniform(schedules.cosine(), 10)
    with pytest.raises(ValueError, match=r"strength must lie in \[1/10, 1\].*got"):
        grids.partial(grid, strength)
