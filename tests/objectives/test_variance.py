import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import schedules
from diffusion.levels import posterior
from diffusion.objectives.objective import Context
from diffusion.objectives.terms.term import Noised
from diffusion.objectives.terms.variance import VariationalBound, _binned_log_likelihood

LINEAR = schedules.linear()


def test_posterior_equals_bayes_rule():
    """q(x_s | x_t, x_0) from the joint Gaussian of (x_s, x_t), for any two levels."""
    for schedule in (LINEAR, schedules.RectifiedFlow(), schedules.VE()):
        now, before = schedule(np.array([0.7])), schedule(np.array([0.6]))
        beta, beta_tilde, c_x, c_x0 = posterior(now, before)
        scale = now.alpha / before.alpha
        covariance = scale * before.sigma**2
        np.testing.assert_allclose(now.sigma**2, scale**2 * before.sigma**2 + beta)
        gain = covariance / now.sigma**2
        np.testing.assert_allclose(c_x, gain)
        np.testing.assert_allclose(c_x0, before.alpha - gain * now.alpha, rtol=1e-9)
        np.testing.assert_allclose(beta_tilde, before.sigma**2 - gain * covariance, rtol=1e-9)


def test_bound_of_the_true_posterior_variance_is_the_kl_of_the_means():
    bound = VariationalBound(LINEAR)
    t = jnp.array([0.4])
    x0, x_t, x0_hat = jnp.full((3, 1, 5), jnp.array([0.3, 0.5, 0.1])[:, None, None])
    zero = jnp.zeros((1, 5))  # nu = 0: beta_tilde, the true variance
    assert float(bound.bits(t, x0, x_t, x0, zero)[0]) == pytest.approx(0, abs=1e-6)
    _, beta_tilde, _, c_x0 = posterior(LINEAR(np.array(0.4)), LINEAR(np.array(0.399)))
    expected = 1000 * (c_x0 * 0.2) ** 2 / (2 * beta_tilde) / np.log(2)
    assert float(bound.bits(t, x0, x_t, x0_hat, zero)[0]) == pytest.approx(expected, rel=1e-3)
    assert float(bound.bits(t, x0, x_t, x0, zero + 1)[0]) > 0


def test_bound_knows_a_shifted_level():
    """Whose t is the moved one."""
    schedule = schedules.RectifiedFlow().shifted(3.0)
    x0, zero = jnp.full((1, 1, 5), 0.3), jnp.zeros((1, 1, 5))
    noised = Noised({"x": x0}, zero + 0.5, schedule(jnp.array([0.4])), x0 - 0.2, zero - 1, {})
    loss, _ = VariationalBound(schedule, weight=1.0)(zero[0, 0, :1], None, Context(), noised)
    _, beta_tilde, _, c_x0 = posterior(schedule(np.array(0.4)), schedule(np.array(0.399)))
    expected = 1000 * (c_x0 * 0.2) ** 2 / (2 * beta_tilde) / np.log(2)
    assert float(loss[0]) == pytest.approx(expected, rel=1e-2)


def test_last_step_is_a_likelihood_in_bins():
    levels = 256
    grid = jnp.linspace(-1, 1, levels)
    for mean, std in ((0.1, 0.02), (0.98, 0.3), (-1.0, 1e-3)):
        log_p = _binned_log_likelihood(grid, jnp.float32(mean), jnp.log(jnp.float32(std)), levels)
        assert float(jnp.exp(log_p).sum()) == pytest.approx(1, abs=1e-3)
    half = 1 / 255
    exact = stats.norm.cdf(0.5 + half, 0.45, 0.05) - stats.norm.cdf(0.5 - half, 0.45, 0.05)
    log_p = _binned_log_likelihood(jnp.array(0.5), jnp.float32(0.45), jnp.log(0.05), levels)
    assert float(jnp.exp(log_p)) == pytest.approx(exact, rel=1e-3)


def test_only_the_variance_learns_from_the_bound():
    bound = VariationalBound(LINEAR)
    x0, x_t = jax.random.normal(jax.random.key(0), (2, 4, 3))

    def total(x0_hat, nu):
        return bound.bits(jnp.array([0.001, 0.2, 0.5, 1.0]), x0, x_t, x0_hat, nu).sum()

    to_mean, to_nu = jax.grad(total, argnums=(0, 1))(x0 * 0.9, jnp.full((4, 3), 0.5))
    assert np.all(to_mean == 0)
    assert np.all(np.isfinite(to_nu)) and np.all(to_nu != 0)


def test_the_term_adds_the_weighted_bound():
    bound = VariationalBound(LINEAR, weight=0.5)
    t, zeros = jnp.array([0.2, 0.7]), jnp.zeros((2, 3))
    noised = Noised({"x": zeros + 0.1}, zeros, LINEAR(t), zeros, zeros - 0.5, {})
    loss, metrics = bound(jnp.array([1.0, 2.0]), None, Context(), noised)
    bits = bound.bits(t, zeros + 0.1, zeros, zeros, zeros + 0.25)
    np.testing.assert_allclose(loss, jnp.array([1.0, 2.0]) + 0.5 * bits, rtol=1e-6)
    assert float(metrics["vlb"]) == pytest.approx(float(bits.mean()), rel=1e-6)
    with pytest.raises(ValueError, match="weight=-1 must be a finite number"):
        VariationalBound(LINEAR, weight=-1)


def test_best_variance_for_an_exact_mean_is_the_posteriors():
    bound = VariationalBound(LINEAR)
    x0 = jnp.full((1, 2), 0.2)
    losses = [
        float(bound.bits(jnp.array([0.01]), x0, x0, x0, jnp.full((1, 2), nu))[0])
        for nu in (0.0, 0.25, 0.5, 1.0)
    ]
    assert losses == sorted(losses) and losses[0] < losses[1]
