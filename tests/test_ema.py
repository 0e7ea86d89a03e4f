import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import ema


def averaged(profile, values):
    average = {"p": jnp.float32(123.0)}  # the initial value
    for t, value in enumerate(values, start=1):
        average = ema.update(average, {"p": jnp.float32(value)}, profile(jnp.int32(t)))
    return float(average["p"])


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_function_equals_the_weighted_average(sigma_rel):
    values = np.random.default_rng(0).normal(size=200)
    gamma = ema.gamma_from_sigma_rel(sigma_rel)
    t = np.arange(1, 201)
    beta = (1 - 1 / t) ** (gamma + 1)
    weights = (1 - beta) * np.append(np.cumprod(beta[:0:-1])[::-1], 1)  # products of later betas
    assert weights.sum() == pytest.approx(1)  # the initial value is forgotten entirely
    assert averaged(ema.power_function(sigma_rel), values) == pytest.approx(
        weights @ values, abs=1e-5
    )
    # and the weights are nearly t^gamma
    ideal = t**gamma / np.sum(t**gamma)
    assert np.abs(weights - ideal).max() < 0.05 * ideal.max()


def test_relative_width_is_the_standard_deviation_of_the_profile():
    t = (np.arange(200_000) + 0.5) / 200_000
    for sigma_rel in (0.02, 0.1, 0.28):
        weights = t ** ema.gamma_from_sigma_rel(sigma_rel)
        weights /= weights.sum()
        deviation = np.sqrt(weights @ (t - weights @ t) ** 2)
        assert deviation == pytest.approx(sigma_rel, rel=1e-4)


def test_gamma_round_trip():
    for gamma in (0.0, 0.5, 6.94, 16.97, 100.0):
        sigma_rel = np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
        assert ema.gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=1e-6)
    # EDM2's two widths and their gammas
    assert ema.gamma_from_sigma_rel(0.05) == pytest.approx(16.97, abs=0.01)
    assert ema.gamma_from_sigma_rel(0.10) == pytest.approx(6.94, abs=0.01)


def test_power_function_is_accurate_late_in_a_run():
    t = 3_000_000
    expected = 1 - (1 - 1 / t) ** (ema.gamma_from_sigma_rel(0.1) + 1)
    assert 1 - float(ema.power_function(0.1)(jnp.int32(t))) == pytest.approx(expected, rel=0.05)


def test_constant_decay():
    values = [1.0, 2.0, 4.0]
    expected = 123 * 0.9**3 + 0.1 * (0.81 * 1 + 0.9 * 2 + 4)
    assert averaged(ema.constant(0.9, ramp=False), values) == pytest.approx(expected, rel=1e-6)


def test_ramp():
    beta = ema.constant(0.99)
    assert float(beta(1)) == pytest.approx(1 / 10)
    assert float(beta(11)) == pytest.approx(11 / 20)
    assert float(beta(10**6)) == pytest.approx(0.99)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_wrong_decay(decay):
    with pytest.raises(ValueError, match=str(decay)):
        ema.constant(decay)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.3])
def test_wrong_width(sigma_rel):
    with pytest.raises(ValueError, match=r"0\.289"):
        ema.power_function(sigma_rel)
