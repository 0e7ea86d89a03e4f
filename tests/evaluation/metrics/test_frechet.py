"""Fréchet distance: closed forms, invariances, its sampling error, and figures' names."""

import numpy as np
import pytest
import scipy.linalg

from diffusion.evaluation.metrics import frechet
from diffusion.evaluation.metrics.metric import Judged
from diffusion.evaluation.moments import Moments, moments
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import Set, of_arrays

rng = np.random.default_rng(0)


def random_statistics(seed, d=5, n=None):
    a = np.random.default_rng(seed).standard_normal((n or d + 3, d))
    return Moments(len(a), a[0], a.T @ a / d)


def test_moments_are_numpys_however_features_are_cut():
    x = 1000 + rng.standard_normal((50, 4))
    for cuts in ([], [1], [20, 20, 31]):
        found = moments(np.split(x, cuts))
        assert found.count == 50
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.cov, np.cov(x.T), rtol=1e-10, atol=1e-12)


def test_commuting_covariances_have_a_closed_form():
    p, q = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    a = Moments(9, np.array([1.0, 2.0, 3.0]), (rotation * p) @ rotation.T)
    b = Moments(9, np.array([0.0, 2.0, 5.0]), (rotation * q) @ rotation.T)
    expected = 1 + 4 + ((np.sqrt(p) - np.sqrt(q)) ** 2).sum()
    assert frechet.frechet_from_statistics(a, b) == pytest.approx(expected, rel=1e-7)


def test_general_covariances_agree_with_the_matrix_square_root():
    for d in (5, 40):
        a, b = random_statistics(1, d), random_statistics(2, d)
        # In a list, because SciPy's versions differ in what else is returned.
        root = np.real(np.atleast_3d(scipy.linalg.sqrtm(a.cov @ b.cov))[..., 0])
        expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * root)
        assert frechet.frechet_from_statistics(a, b) == pytest.approx(expected, rel=1e-6)
        assert frechet.frechet_from_statistics(b, a) == pytest.approx(expected, rel=1e-6)


def test_singular_covariances_of_a_subspace_are_as_those_within_it():
    a, b = random_statistics(1, 4), random_statistics(2, 4)
    basis = np.linalg.qr(rng.standard_normal((30, 4)))[0]
    wide = [Moments(9, basis @ s.mean, basis @ s.cov @ basis.T) for s in (a, b)]
    expected = frechet.frechet_from_statistics(a, b)
    assert frechet.frechet_from_statistics(*wide) == pytest.approx(expected, rel=1e-6)


def test_same_set_is_zero_even_if_its_covariance_is_singular():
    x = rng.standard_normal((8, 64))
    assert frechet.frechet_distance(x, x) < 1e-6
    assert frechet.frechet_distance(x, x[::-1]) < 1e-6


def test_invariant_to_rotation_and_shift_and_quadratic_in_scale():
    x, y = rng.standard_normal((100, 6)), 2 * rng.standard_normal((80, 6)) + 1
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    d = frechet.frechet_distance(x, y)
    assert frechet.frechet_distance(x @ rotation + 3, y @ rotation + 3) == pytest.approx(d)
    assert frechet.frechet_distance(3 * x, 3 * y) == pytest.approx(9 * d)


def test_images_are_flattened_and_errors_are_clear():
    x = rng.standard_normal((20, 2, 2, 1))
    assert frechet.frechet_distance(x, x + 1) == pytest.approx(4)
    with pytest.raises(ValueError, match="differ in size: 4 and 3"):
        frechet.frechet_distance(x, rng.standard_normal((20, 3)))
    with pytest.raises(ValueError, match="NaN"):
        frechet.frechet_distance(x, np.full_like(x, np.nan))
    with pytest.raises(ValueError, match="at least one"):
        moments([np.zeros((0, 3))])


@pytest.mark.parametrize("d", [4, 32])
def test_standard_error_is_that_of_repeated_draws(d):
    b = random_statistics(3, d, 3 * d)
    scale = np.linspace(0.5, 1.5, d)
    draws = np.random.default_rng(d).standard_normal((200, 1000, d)) * scale
    found = [frechet.frechet_with_error(moments([x]), b, [x[:700], x[700:]]) for x in draws]
    distances, errors = np.array(found).T
    assert distances[0] == pytest.approx(
        frechet.frechet_from_statistics(moments([draws[0]]), b), rel=1e-10
    )
    # The deviation of 200 draws is itself known to 5 %.
    assert errors.mean() == pytest.approx(distances.std(ddof=1), rel=0.12)


def test_standard_error_is_that_of_the_bootstrap():
    x, b = np.random.default_rng(5).gamma(2.0, size=(1000, 6)), random_statistics(4, 6, 20)
    error = frechet.frechet_with_error(moments([x]), b, [x])[1]
    chosen = np.random.default_rng(6).integers(0, 1000, (400, 1000))
    again = [frechet.frechet_from_statistics(moments([x[i]]), b) for i in chosen]
    assert error == pytest.approx(np.std(again, ddof=1), rel=0.1)


def test_standard_error_of_singular_covariances_is_that_within_the_subspace():
    x, b = rng.standard_normal((200, 3)), random_statistics(2, 3)
    basis = np.linalg.qr(rng.standard_normal((12, 3)))[0]
    wide = Moments(9, basis @ b.mean, basis @ b.cov @ basis.T)
    expected = frechet.frechet_with_error(moments([x]), b, [x])
    y = x @ basis.T
    assert frechet.frechet_with_error(moments([y]), wide, [y]) == pytest.approx(expected, rel=1e-5)


def judged(x, real, name="net", output="features"):
    net = Network(name, lambda: None)
    return Judged(of_arrays("samples", {output: x}), lambda _: real, net)


def test_figures_stand_beside_halves_of_real_examples():
    x, y = rng.standard_normal((100, 3)), rng.standard_normal((90, 3))
    found = frechet.metric().measure(judged(x, of_arrays("real", {"features": y})))
    assert list(found) == [
        *("fd_net", "fd_net_ci", "fd_net_half", "fd_net_half_real", "fd_net_half_size")
    ]
    assert found["fd_net"] == pytest.approx(frechet.frechet_distance(x, y))
    assert found["fd_net_half_size"] == 45
    assert 0 < found["fd_net"] < found["fd_net_half"]


def test_statistics_alone_serve_and_few_samples_are_noted():
    known = {name: random_statistics(1, 60) for name in ("features", "spatial")}
    real = Set("file", 0, lambda output: 1 / 0, known=known)
    x = rng.standard_normal((100, 60))
    found = frechet.fid().measure(judged(x, real, "inception2015"))
    expected = frechet.frechet_from_statistics(moments([x]), known["features"])
    assert found["fid_inception2015"] == pytest.approx(expected)
    assert found["fid_inception2015_count"] == 100
    assert "100 samples are too few" in found["fid_inception2015_note"]
    assert "fd_net_half" not in frechet.metric().measure(judged(x, real))
    x = rng.standard_normal((120, 60))
    found = frechet.sfid().measure(judged(x, real, "inception2015", "spatial"))
    assert list(found) == ["sfid_inception2015", "sfid_inception2015_ci"]
