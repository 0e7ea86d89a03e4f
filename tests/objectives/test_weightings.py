from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PREDICTIONS, SCHEDULES

from diffusion import predictions
from diffusion.levels import NoiseLevel
from diffusion.objectives import weightings
from diffusion.objectives.distances import l1, l2, pseudo_huber

SNR_BASED = {
    "snr": (weightings.snr, lambda snr: snr),
    "truncated_snr": (weightings.truncated_snr, lambda snr: np.maximum(snr, 1)),
    "min_snr": (weightings.min_snr, lambda snr: np.minimum(snr, 5)),
    "soft_min_snr": (weightings.soft_min_snr, lambda snr: 1 / (1 / snr + 1 / 4)),
    "p2": (partial(weightings.p2, gamma=0.5), lambda snr: snr / (1 + snr) ** 0.5),
    "sigmoid": (
        partial(weightings.sigmoid, bias=1.0),
        lambda snr: snr / (1 + np.exp(np.log(snr) - 1)),
    ),
    "edm": (partial(weightings.edm, sigma_data=0.7), lambda snr: snr + 1 / 0.7**2),
}


def level_at(schedule, times):
    return NoiseLevel(*(jnp.asarray(leaf) for leaf in schedule(times * schedule.t_max)))


@pytest.mark.parametrize("name", SNR_BASED)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weight_on_x0_is_the_papers_whatever_the_prediction(name, prediction):
    """w |F - F*|^2 = g(SNR) |x0_hat - x0|^2 for a network that is wrong by some error."""
    weighting, of_snr = SNR_BASED[name]
    with jax.enable_x64(True):
        level = level_at(SCHEDULES["cosine"], np.linspace(0.1, 0.9, 5))
        x, output, wrong = np.random.default_rng(0).normal(size=(3, 5, 3))
        row = PREDICTIONS[prediction]
        c_out = predictions.precondition(row, level).c_out
        x0_error = predictions.to_x0(row, level, x, wrong) - predictions.to_x0(
            row, level, x, output
        )
        weighted = weighting(level, c_out) * l2(wrong, output)
        expected = of_snr(np.asarray(level.snr)) * np.mean(np.square(x0_error), axis=1)
        np.testing.assert_allclose(weighted, expected, rtol=1e-9)


def test_simple_counts_the_networks_own_error():
    level = level_at(SCHEDULES["cosine"], np.linspace(0.1, 0.9, 5))
    np.testing.assert_array_equal(weightings.simple(level, level.sigma), jnp.ones(5))


def test_snr_on_eps_prediction_is_simple():
    level = level_at(SCHEDULES["linear"], np.linspace(0.01, 1, 50))
    c_out = predictions.precondition(predictions.eps, level).c_out
    np.testing.assert_allclose(weightings.snr(level, c_out), 1, rtol=1e-5)


def test_edm_weighting_with_edm_prediction_is_one():
    level = level_at(SCHEDULES["edm"], np.geomspace(1e-4, 1, 50))
    c_out = predictions.precondition(predictions.edm, level).c_out
    np.testing.assert_allclose(weightings.edm(level, c_out), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["vp_sde", "cosine", "rectified_flow", "edm", "shifted_flow"])
def test_elbo_equals_the_bound_of_a_gaussian(name):
    """For data N(0, s^2) and its exact denoiser, 1/2 int -SNR'(t) mmse dt is known in closed form:
    mmse = 1 / (1/s^2 + SNR), so the integral over [t_0, t_1] is a difference of logs."""
    schedule, s = SCHEDULES[name], 0.6
    ends = np.array([0.02, 0.9]) * schedule.t_max
    snr0, snr1 = np.asarray(schedule(ends).snr)  # for a shifted schedule too
    exact = 0.5 * np.log((1 / s**2 + snr0) / (1 / s**2 + snr1))
    # uniform times, on a fine grid, as a share of the whole range
    t = np.geomspace(*ends, 40_001)
    level = NoiseLevel(*(jnp.asarray(leaf, jnp.float32) for leaf in schedule(t)))
    weight = weightings.elbo(level, jnp.ones(len(t)), schedule=schedule)
    mmse = 1 / (1 / s**2 + np.asarray(schedule(t).snr))
    integral = np.trapezoid(np.asarray(weight, np.float64) * mmse / schedule.t_max, t)
    assert integral == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("t, expected", [(0.2, 11.11), (0.5, 0.4444), (0.8, 0.0434)])
def test_elbo_of_a_shifted_flow(t, expected):
    """SNR = ((1 - t) / 3t)^2, so that -1/2 dSNR/dt = (1 - t) / 9 t^3."""
    schedule = SCHEDULES["shifted_flow"]
    level = level_at(schedule, np.array([t]))
    weight = weightings.elbo(level, jnp.ones(1), schedule=schedule)
    assert float(weight[0]) == pytest.approx((1 - t) / 9 / t**3, rel=1e-5)
    assert float(weight[0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", weightings.CHOICES)
def test_weights_at_both_ends_are_the_limits(name, prediction):
    """The float32 weight at t = 0 and t_max is that of float64 close to them, and never NaN."""
    row = PREDICTIONS[prediction]
    for schedule in SCHEDULES.values():
        weighting = weightings.CHOICES[name]
        weighting = partial(weighting, schedule=schedule) if name == "elbo" else weighting
        found = weightings.weights(weighting, row, level_at(schedule, np.array([0.0, 1.0])))
        with jax.enable_x64(True):
            level = schedule(np.array([0.0, 1.0]) * schedule.t_max)
            near = NoiseLevel(jnp.asarray(level.t), *(jnp.maximum(a, 1e-12) for a in level[1:]))
            limit = weighting(near, predictions.precondition(row, near).c_out)
        for weight, right in zip(np.asarray(found, np.float64), np.asarray(limit)):
            if right > 1e10:
                assert weight > 1e10, "the limit is infinite"
            else:
                assert weight == pytest.approx(right, rel=2e-3, abs=1e-10), schedule


def test_distances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    np.testing.assert_allclose(l2(a, b), ((a - b) ** 2).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(l1(a, b), np.abs(a - b).mean((1, 2, 3)), rtol=1e-5)
    small, large = pseudo_huber(a, a + 1e-3, c=1.0), pseudo_huber(a, a + 1e3, c=1.0)
    np.testing.assert_allclose(small, 0.5e-6, rtol=0.3)
    np.testing.assert_allclose(large, 1e3 - 1, rtol=1e-3)
    assert np.all(pseudo_huber(a, a) == 0)
    assert np.all(np.isfinite(jax.grad(lambda x: pseudo_huber(x, a).sum())(a)))


@pytest.mark.parametrize(
    "function, options",
    [
        (weightings.min_snr, {"gamma": -5}),
        (weightings.soft_min_snr, {"gamma": 0}),
        (weightings.truncated_snr, {"minimum": -1}),
        (weightings.p2, {"k": -1}),
        (weightings.p2, {"gamma": np.nan}),
        (weightings.sigmoid, {"bias": np.inf}),
        (weightings.edm, {"sigma_data": 0}),
    ],
)
def test_options_that_flip_or_lose_the_sign_are_refused(function, options):
    level = level_at(SCHEDULES["cosine"], np.array([0.5]))
    with pytest.raises(ValueError, match=next(iter(options))):
        function(level, jnp.ones(1), **options)


@pytest.mark.parametrize("c", [0.0, -1.0, np.inf, np.nan])
def test_pseudo_huber_needs_a_positive_c(c):
    with pytest.raises(ValueError, match=r"c must be a finite number > 0"):
        pseudo_huber(jnp.zeros((1, 2)), jnp.ones((1, 2)), c=c)
