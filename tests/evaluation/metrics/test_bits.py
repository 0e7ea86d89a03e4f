"""Whole data sets measured by either estimator, beside what is known exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import schedules
from diffusion.data import sources
from diffusion.evaluation.metrics import bits
from diffusion.evaluation.metrics.bits import evaluate_bits
from diffusion.sampling.mixture import gaussian_mixture

FLOW = schedules.RectifiedFlow()


def denoiser(params):
    """Labels shift the data by 0, 1, 2, ..."""
    shape = gaussian_mixture(np.zeros((1, 2)), 0.5)

    def denoise(x, level, cond):
        moved = params["scale"] * cond.label[:, None]
        alpha = jnp.broadcast_to(level.alpha, len(x))[:, None]
        return moved + shape(x - alpha * moved, level)

    return denoise


def gaussians(count, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, count)
    x = 0.5 * rng.normal(size=(count, 2)) + 0.2 * label[:, None]
    return sources.from_arrays("gaussians", x.astype(np.float32), label)


def measure(estimator, data, **options):
    options = dict(count=50, batch_size=16, labels=True) | options
    return evaluate_bits(estimator, denoiser, FLOW, {"scale": jnp.float32(0.2)}, data, **options)


def test_ode_on_two_sources_over_devices_with_a_batch_that_does_not_fit():
    data = {"held_out": gaussians(50, 0), "train": gaussians(30, 1)}
    assert jax.local_device_count() == 4
    result = measure(bits.ode(divergence="exact"), data)
    for name, count in (("held_out", 50), ("train", 30)):
        batch = data[name].all()
        log_p = stats.norm.logpdf(batch["x"], 0.2 * batch["label"][:, None], 0.5).sum(1)
        assert result[name]["count"] == count and result[name]["failed"] == 0
        assert result[name]["nats"] == pytest.approx(-log_p.mean(), abs=2e-3)
        expected = -log_p / 2 / math.log(2)
        assert result[name]["bits_per_dim"] == pytest.approx(expected.mean(), abs=2e-3)
        error = expected.std(ddof=1) / math.sqrt(count)
        assert result[name]["standard_error"] == pytest.approx(error, rel=1e-2)
    failing = measure(bits.ode(divergence="exact", max_steps=2), {"held_out": data["held_out"]})
    assert failing["held_out"]["failed"] == 50 and failing["held_out"]["count"] == 0


def test_bound_is_above_and_near_and_wrong_weights_cost():
    data = {"held_out": gaussians(4000, 0)}
    estimator = bits.bound(steps=200, nu=1.0, draws=20)
    options = dict(count=4000, batch_size=4000)
    result = measure(estimator, data, **options)["held_out"]
    exact = (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5)) / math.log(2)
    assert result["evaluations"] == 21
    error = result["standard_error"]
    assert -4 * error < result["bits_per_dim"] - exact < 0.1 + 4 * error
    wrong = evaluate_bits(estimator, denoiser, FLOW, {"scale": 1.5}, data, labels=True, **options)
    assert wrong["held_out"]["bits_per_dim"] > result["bits_per_dim"] + 1


def test_discrete_data_are_measured_in_their_own_levels():
    """A wide Gaussian on the steps of 17 grey levels: minus log2 of a bin's mass."""
    x = np.random.default_rng(0).normal(size=(64, 2)) * 0.5
    x = np.clip(np.round(x * 8), -8, 8).astype(np.float32) / 8
    data = {"held_out": sources.from_arrays("grey", x, np.zeros(64, int), levels=17)}
    result = measure(bits.ode(divergence="exact"), data, count=64, batch_size=64)["held_out"]
    mass = stats.norm.cdf(x + 1 / 16, 0, 0.5) - stats.norm.cdf(x - 1 / 16, 0, 0.5)
    assert result["bits_per_dim"] == pytest.approx(-np.log2(mass).mean(), abs=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bits.ode(divergence="exat"), "Did you mean 'exact'"),
        (lambda: bits.ode(dequantization="unifrom"), "Did you mean 'uniform'"),
        (lambda: bits.ode(samples=0), "samples must lie in"),
        (lambda: bits.bound(nu=2.0), r"nu must lie in \[0, 1\]"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
