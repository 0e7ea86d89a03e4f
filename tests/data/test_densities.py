"""Two-dimensional densities: where their mass is, and that it is reproducible."""

import numpy as np
import pytest

from diffusion.data import densities

N = 20_000


@pytest.mark.parametrize("name", densities.DENSITIES)
def test_scale_is_that_of_images(name):
    x = densities.sample(name, N, np.random.default_rng(0))
    assert x.shape == (N, 2)
    assert x.dtype == np.float32
    assert 0.4 < np.sqrt((x.std(0) ** 2).mean()) < 0.6
    assert np.mean(np.abs(x).max(1) < 1.05) > 0.99


def test_same_generator_same_points():
    a, b, c = (densities.sample("pinwheel", 10, np.random.default_rng(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.all(a != c)


def test_checkerboard_is_uniform_on_the_dark_squares():
    x = densities.sample("checkerboard", N, np.random.default_rng(0))
    cell = np.floor((x + 1) * 2).astype(int).clip(0, 3)
    assert np.all(cell.sum(1) % 2 == 0)
    counts = np.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16)
    dark = counts[counts > 0]
    assert len(dark) == 8
    assert np.abs(dark / N - 1 / 8).max() < 0.012  # five standard errors


def test_eight_gaussians_have_their_moments():
    x = densities.sample("eight_gaussians", N, np.random.default_rng(0))
    np.testing.assert_allclose(x.mean(0), 0, atol=0.02)
    # On a circle of radius r, cos^2 averages to 1/2: variance r^2 / 2 + 0.05^2.
    np.testing.assert_allclose(x.var(0), 0.75**2 / 2 + 0.05**2, atol=0.01)


def test_swiss_roll_radius_grows_with_the_angle():
    x = densities.sample("swiss_roll", N, np.random.default_rng(0)) * 15
    radius = np.linalg.norm(x, axis=1)
    # radius = angle up to the noise, so radius - polar angle is close to a multiple of 2 pi.
    turns = (radius - np.arctan2(x[:, 1], x[:, 0])) / (2 * np.pi)
    assert np.abs(turns - np.round(turns)).mean() < 0.06


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'moons'.*two_moons"):
        densities.sample("moons", 3, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["two_moons", "swiss_roll", "checkerboard", "eight_gaussians"])
def test_log_density_integrates_to_one_and_is_that_of_the_samples(name):
    line, step = np.linspace(-1.6, 1.6, 161, retstep=True)
    grid = np.stack(np.meshgrid(line + 1e-3, line + 1e-3), -1).reshape(-1, 2)
    p = np.exp(densities.log_density(name, grid))
    assert p.sum() * step**2 == pytest.approx(1, abs=0.02)
    # E_samples[p] = integral of p^2: wrong if the samples follow another density.
    x = densities.sample(name, 4000, np.random.default_rng(0))
    seen = np.exp(densities.log_density(name, x))
    error = 4 * seen.std() / np.sqrt(len(x)) + 0.02 * seen.mean()
    assert seen.mean() == pytest.approx((p**2).sum() * step**2, abs=error)


def test_pinwheel_has_no_simple_density():
    assert densities.log_density("pinwheel", np.zeros((1, 2))) is None
