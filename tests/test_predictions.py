import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PREDICTIONS, SCHEDULES

from diffusion import predictions
from diffusion.levels import NoiseLevel, diffuse

PAIRS = [(s, p) for s in SCHEDULES for p in PREDICTIONS]


def levels(schedule, times):
    return NoiseLevel(*(jnp.asarray(leaf) for leaf in schedule(times * schedule.t_max)))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("schedule_name, prediction_name", PAIRS)
def test_round_trips_in_float64(float64, schedule_name, prediction_name):
    """output -> x0 and back, wherever the output determines it."""
    prediction = PREDICTIONS[prediction_name]
    level = levels(SCHEDULES[schedule_name], np.linspace(0.02, 0.98, 9))
    x0, noise = np.random.default_rng(0).normal(size=(2, 9, 5))
    x_t = diffuse(x0, noise, level)
    output = predictions.target(prediction, level, x0, noise)
    assert output.dtype == jnp.float64
    scale = max(1.0, float(level.ratio.max()))
    np.testing.assert_allclose(
        predictions.to_x0(prediction, level, x_t, output), x0, atol=1e-10 * scale
    )


@pytest.mark.parametrize("schedule_name, prediction_name", PAIRS)
def test_float32_at_the_ends(schedule_name, prediction_name):
    """Errors at the noisiest and the cleanest step stay at rounding, scaled by the noise."""
    schedule, prediction = SCHEDULES[schedule_name], PREDICTIONS[prediction_name]
    level = levels(schedule, np.array([1e-3, 1.0]))
    x0, noise = np.random.default_rng(1).normal(size=(2, 2, 64)).astype(np.float32)
    output = predictions.target(prediction, level, x0, noise)
    assert np.all(np.isfinite(output))
    if prediction_name == "eps" and float(level.alpha[1]) == 0:
        return  # eps says nothing of x_0 there
    x_t = diffuse(x0, noise, level)
    error = np.abs(predictions.to_x0(prediction, level, x_t, output) - x0).max(axis=1)
    # eps divides by alpha, and every other prediction at most by 1.
    bound = 1e-5 * (np.asarray(level.ratio) + 1 if prediction_name == "eps" else np.ones(2))
    size = np.asarray(level.sigma) if schedule.__class__.__name__ in ("EDM", "VE") else 1.0
    assert np.all(error <= np.maximum(bound, 2e-6 * size)), error


@pytest.mark.parametrize("schedule_name, prediction_name", PAIRS)
def test_coefficients_equal_the_published_table(float64, schedule_name, prediction_name):
    level = levels(SCHEDULES[schedule_name], np.linspace(0.05, 0.95, 7))
    alpha, sigma = level.alpha, level.sigma
    data = 0.7
    norm = alpha**2 * data**2 + sigma**2
    c_skip, c_out = {
        "eps": (1 / alpha, -sigma / alpha),
        "x0": (0 * alpha, 1 + 0 * alpha),
        "v": (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
        "flow": (1 / (alpha + sigma), -sigma / (alpha + sigma)),
        "edm": (alpha * data**2 / norm, sigma * data / norm**0.5),
    }[prediction_name]
    c = predictions.precondition(PREDICTIONS[prediction_name], level)
    np.testing.assert_allclose(c.c_skip, c_skip, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(jnp.abs(c.c_out), jnp.abs(c_out), rtol=1e-12)
    np.testing.assert_allclose(jnp.sign(c.c_out), jnp.sign(c_out))


@pytest.mark.parametrize("prediction_name", PREDICTIONS)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_same_optimum_on_a_gaussian(float64, schedule_name, prediction_name):
    """Least squares on each target, linear in x_t, recovers the same E[x_0 | x_t]."""
    prediction = PREDICTIONS[prediction_name]
    level = levels(SCHEDULES[schedule_name], np.array(0.4))
    mean, std = 0.3, 0.8
    rng = np.random.default_rng(2)
    # Whitened draws make the regression exact: sample moments equal the true ones.
    z = rng.normal(size=(4000, 2))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / len(z)).T)
    x0, noise = mean + std * z[:, :1], z[:, 1:]
    x_t = diffuse(x0, noise, level)
    features = np.concatenate([x_t, np.ones_like(x_t)], axis=1)
    best, *_ = np.linalg.lstsq(
        features, np.asarray(predictions.target(prediction, level, x0, noise)), rcond=None
    )
    x0_hat = predictions.to_x0(prediction, level, x_t, features @ best)
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    np.testing.assert_allclose(x0_hat, mean + gain * (x_t - level.alpha * mean), atol=1e-10)


def test_edm_with_unit_data_is_minus_v_on_vp(float64):
    level = levels(SCHEDULES["cosine"], np.linspace(0, 1, 11))
    edm, v = predictions.edm(level, sigma_data=1.0), predictions.v(level)
    np.testing.assert_allclose(edm.a, -v.a, atol=1e-12)
    np.testing.assert_allclose(edm.b, -v.b, atol=1e-12)
    np.testing.assert_allclose(edm.c_in, 1, rtol=1e-12)


def test_edm_input_and_target_have_unit_variance(float64):
    for name in ("edm", "rectified_flow", "cosine"):
        level = levels(SCHEDULES[name], np.linspace(0.01, 1, 11))
        row = predictions.edm(level, sigma_data=0.7)
        np.testing.assert_allclose((row.a * 0.7) ** 2 + row.b**2, 1, rtol=1e-12)
        x_variance = (level.alpha * 0.7) ** 2 + level.sigma**2
        np.testing.assert_allclose(row.c_in**2 * x_variance, 1, rtol=1e-12)


def test_flow_target_is_the_velocity_of_the_path(float64):
    schedule = SCHEDULES["rectified_flow"]
    x0, noise = np.random.default_rng(3).normal(size=(2, 1, 4))

    def path(t):
        return diffuse(x0, noise, schedule(jnp.full(1, t)))

    _, velocity = jax.jvp(path, (0.3,), (1.0,))
    target = predictions.target(predictions.flow, schedule(jnp.full(1, 0.3)), x0, noise)
    np.testing.assert_allclose(target, velocity, rtol=1e-12)
