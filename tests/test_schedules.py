from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SCHEDULES, VARIANCE_PRESERVING
from scipy.integrate import quad

from diffusion import schedules
from diffusion.pipelines import description


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_from_clean_data(name):
    schedule = SCHEDULES[name]
    t = np.linspace(0, 1, 2001) * schedule.t_max
    level = schedule(t)
    assert level.alpha.dtype == np.float64
    assert level.alpha[0] == 1 and level.sigma[0] == 0
    angle = np.arctan2(level.sigma, level.alpha)
    assert np.all(np.diff(angle) > 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_inverse(name):
    schedule = SCHEDULES[name]
    t = np.concatenate([np.geomspace(1e-6, 1e-2, 50), np.linspace(0.01, 1, 777)]) * schedule.t_max
    level = schedule(t)
    recovered = schedule.invert(level.alpha, level.sigma)
    same = schedule(t if "shifted" in name or name == "moved_table" else recovered)
    np.testing.assert_allclose(same.alpha, level.alpha, rtol=0, atol=1e-12)
    np.testing.assert_allclose(same.sigma, level.sigma, rtol=1e-10)
    np.testing.assert_allclose(recovered, t, rtol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_level_leads_back_to_the_time_that_gives_it(name):
    """Whatever its ``t`` means, which a shifted schedule has moved."""
    schedule = SCHEDULES[name]
    t = np.linspace(0, 1, 401) * schedule.t_max
    level = schedule(t)
    np.testing.assert_allclose(schedule.argument(level), t, rtol=1e-9, atol=1e-12)
    for again, leaf in zip(schedule(schedule.argument(level)), level):
        np.testing.assert_allclose(again, leaf, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scaling_the_pair_does_not_change_its_time(name):
    schedule = SCHEDULES[name]
    level = schedule(0.3 * schedule.t_max)
    one, other = (schedule.invert(c * level.alpha, c * level.sigma) for c in (1.0, 7.0))
    np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_jax_in_float32_agrees_with_numpy_in_float64(name):
    schedule = SCHEDULES[name]
    t = np.linspace(0, 1, 501).astype(np.float32) * schedule.t_max
    exact, level = schedule(t.astype(np.float64)), jax.jit(schedule.__call__)(jnp.asarray(t))
    assert level.alpha.dtype == jnp.float32
    for leaf, reference in zip(level, exact):
        np.testing.assert_allclose(leaf, reference, atol=1e-6 * max(1, np.abs(reference).max()))


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
    level = SCHEDULES[name](np.linspace(0, 1, 1234))
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-12)


def test_tables_hold_the_cumulative_products():
    betas = np.linspace(1e-4, 0.02, 1000)
    level = schedules.linear()(np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(level.alpha**2, np.cumprod(1 - betas), rtol=1e-12)
    assert level.sigma[0] == pytest.approx(1e-2, rel=1e-12)
    # Stable Diffusion's smallest and largest sigma / alpha, as k-diffusion prints them.
    ratio = schedules.scaled_linear()(np.array([1e-3, 1.0])).ratio
    np.testing.assert_allclose(ratio, [0.0292, 14.6146], rtol=2e-3)


def test_cosine_and_sigmoid_follow_their_formulas():
    t = np.linspace(0.01, 0.99, 99)
    cosine = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedules.cosine()(t).alpha ** 2, cosine, rtol=1e-6)

    def logistic(z):
        return 1 / (1 + np.exp(-z / 0.9))

    sigmoid = (logistic(3) - logistic(6 * t - 3)) / (logistic(3) - logistic(-3))
    np.testing.assert_allclose(schedules.sigmoid(tau=0.9)(t).alpha ** 2, sigmoid, rtol=1e-6)


def test_zero_terminal_snr_keeps_the_first_step_and_empties_the_last():
    table = schedules.scaled_linear()
    rescaled = schedules.zero_terminal_snr(table)
    assert rescaled.alphas[0] == pytest.approx(table.alphas[0], rel=1e-12)
    assert rescaled.alphas[-1] == 0 and rescaled.sigmas[-1] == 1
    assert np.all(rescaled.alphas[1:] < table.alphas[1:])


def test_vp_sde_integrates_its_beta():
    schedule = schedules.VPSDE(0.1, 20.0)
    for t in (0.1, 0.5, 1.0):
        integral, _ = quad(lambda s: 0.1 + s * 19.9, 0, t)
        assert schedule(t).alpha == pytest.approx(np.exp(-integral / 2), rel=1e-12)


def test_ve_variance_is_the_sde_integral():
    schedule = schedules.VE(0.01, 50.0)

    def squared_diffusion(s):  # g^2 of Song et al., eq. 30
        return (0.01 * 5000**s) ** 2 * 2 * np.log(5000)

    for t in (0.05, 0.5, 1.0):
        assert schedule(t).sigma ** 2 == pytest.approx(quad(squared_diffusion, 0, t)[0], rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "edm", "rectified_flow", "trigonometric_flow"])
def test_shift_multiplies_the_ratio(name):
    schedule = SCHEDULES[name]
    t = np.array([0.1, 0.4, 0.8])
    moved = schedule.shifted(3.0)
    if name == "edm":  # time is sigma: the same noise at the same time, up to a larger maximum
        assert moved.t_max == 3 * schedule.t_max
        return
    np.testing.assert_allclose(moved(t).ratio, 3 * schedule(t).ratio, rtol=1e-10)


def test_shift_of_the_flow_is_sd3s():
    t = np.linspace(0, 1, 11)
    level = schedules.RectifiedFlow().shifted(3.0)(t)
    np.testing.assert_allclose(level.t, 3 * t / (1 + 2 * t), rtol=1e-12)
    np.testing.assert_allclose(level.sigma, level.t, rtol=1e-12)


def test_time_derivative_is_finite_inside():
    for name, schedule in SCHEDULES.items():
        slope = jax.grad(lambda t, s=schedule: s(t).log_snr)(0.37 * schedule.t_max)
        h = 1e-4
        ends = schedule(np.array([0.37 - h, 0.37 + h]) * schedule.t_max).log_snr
        numeric = (ends[1] - ends[0]) / (2 * h * schedule.t_max)
        np.testing.assert_allclose(slope, numeric, rtol=2e-2, err_msg=name)


def test_bad_tables_and_shifts_are_refused():
    with pytest.raises(ValueError, match=r"betas must lie in \(0, 1\)"):
        schedules.from_betas(np.array([0.1, 1.0]))
    with pytest.raises(ValueError, match="decrease strictly"):
        schedules.Table(np.array([0.5, 0.5]), np.array([0.75**0.5, 0.75**0.5]))
    with pytest.raises(ValueError, match="must be 1"):
        schedules.Table(np.array([0.9, 0.5]), np.array([0.9, 0.9]))
    with pytest.raises(ValueError, match=r"shift must lie in \(0, 1e"):
        schedules.RectifiedFlow().shifted(-1.0)


@pytest.mark.parametrize(
    "text",
    [
        *("zero_terminal_snr(rectified_flow)", "zero_terminal_snr(vp_sde)", "shifted(3, 2)"),
        *("zero_terminal_snr(linear(steps=1))", "shifted(ve, inf)", "shifted(edm, -1)"),
        *("linear(beta_start=inf)", "linear(steps=0)", "linear(beta_end=1)", "cosine(steps=-1)"),
        *("scaled_linear(beta_start=-1)", "scaled_linear(steps=2000000000)", "cosine(offset=-1)"),
        *("cosine(offset=inf)", "cosine(max_beta=inf)", "sigmoid(steps=-1)", "sigmoid(tau=inf)"),
        *("sigmoid(start=3)", "sigmoid(end=inf)", "sigmoid(tau=-1)", "vp_sde(beta_min=-5)"),
        *("vp_sde(beta_max=0)", "vp_sde(beta_max=-1)", "vp_sde(beta_max=inf)", "sub_vp_sde(-1)"),
        *("ve(sigma_min=0)", "ve(sigma_max=inf)", "ve(sigma_max=0.001)", "edm(sigma_max=0)"),
        *("edm(-3)", "edm(inf)", "edm(sigma_max=1e24)"),
    ],
)
def test_options_without_meaning_are_refused(text):
    d = SimpleNamespace(schedule=text)
    with pytest.raises(ValueError, match=r"^config\.objective\.schedule"):
        description.schedule(d, "config.objective.")
