import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import schedules
from diffusion.objectives import times

FLOW = schedules.RectifiedFlow()
U = jnp.asarray((np.arange(20_000) + 0.5) / 20_000, jnp.float32)


def test_uniforms_are_uniform_and_inside():
    index = jnp.arange(4096)
    for u in (
        times.independent_uniforms(jax.random.key(0), index),
        times.stratified_uniforms(jax.random.key(0), index, 4096),
    ):
        assert u.min() > 0 and u.max() < 1
        assert stats.kstest(np.asarray(u), "uniform").pvalue > 0.01


def test_stratified_puts_one_in_each_stratum():
    u = times.stratified_uniforms(jax.random.key(3), jnp.arange(64), 64)
    assert sorted(np.floor(np.asarray(u) * 64).astype(int)) == list(range(64))
    # over many keys a single example still sees all times
    first = jax.vmap(lambda k: times.stratified_uniforms(k, jnp.arange(2), 64)[0])
    many = first(jax.random.split(jax.random.key(1), 2000))
    assert stats.kstest(np.asarray(many), "uniform").pvalue > 0.01


def test_draws_do_not_depend_on_the_batch_around_them():
    key = jax.random.key(5)
    whole = times.independent_uniforms(key, jnp.arange(8))
    part = times.independent_uniforms(key, jnp.arange(4, 8))
    np.testing.assert_array_equal(whole[4:], part)


def test_discrete_times_are_the_tables():
    t = times.discrete(U, FLOW, steps=50)
    values, counts = np.unique(np.asarray(t), return_counts=True)
    np.testing.assert_allclose(values, np.arange(1, 51) / 50, rtol=1e-6)
    np.testing.assert_allclose(counts, 400, atol=1)


def test_logit_normal():
    logit = jax.scipy.special.logit(times.logit_normal(U, FLOW, mean=0.5, std=0.8))
    assert logit.mean() == pytest.approx(0.5, abs=1e-3)
    assert logit.std() == pytest.approx(0.8, abs=2e-3)


def test_mode_density():
    """Esser et al.'s density of f(u) is |d f^-1 / dt|; compare a histogram with it."""
    t = np.sort(np.asarray(times.mode(U, FLOW, scale=1.29)))
    assert t[0] >= 0 and t[-1] <= 1
    slope = np.gradient(np.arange(len(t)) / len(t), t)
    u = 1 - np.arange(len(t)) / len(t)  # f falls
    expected = 1 / np.abs(-1 - 1.29 * (-np.pi / 2 * np.sin(np.pi * u) + 1))
    np.testing.assert_allclose(slope[500:-500], expected[500:-500], rtol=2e-2)
    np.testing.assert_allclose(times.mode(U, FLOW, scale=0.0), 1 - U, atol=1e-6)


def test_cosmap_has_the_cosine_schedules_ratios():
    level = FLOW(times.cosmap(U, FLOW))
    np.testing.assert_allclose(level.ratio, jnp.tan(jnp.pi / 2 * U), rtol=2e-3)


@pytest.mark.parametrize(
    "schedule", [schedules.EDM(), schedules.cosine(), FLOW], ids=["edm", "cosine", "flow"]
)
def test_log_normal_in_the_ratio_of_any_schedule(schedule):
    log_ratio = jnp.log(schedule(times.log_normal(U, schedule, mean=-0.6, std=0.9)).ratio)
    assert log_ratio.mean() == pytest.approx(-0.6, abs=5e-3)
    assert log_ratio.std() == pytest.approx(0.9, abs=5e-3)


def test_all_stay_within_the_schedule():
    for schedule in (schedules.EDM(), schedules.linear(), FLOW):
        for distribution in (
            *(times.uniform, times.discrete, times.logit_normal),
            *(times.mode, times.cosmap, times.log_normal),
        ):
            t = distribution(U, schedule)
            assert t.min() >= -1e-6 and t.max() <= schedule.t_max * (1 + 1e-6), distribution


@pytest.mark.parametrize(
    "distribution, options",
    [
        *((times.discrete, {"steps": n}) for n in (-5, 0, 2**24)),
        *((times.mode, {"scale": s}) for s in (3.0, -1.1, np.nan, np.inf)),
        *((f, {"mean": m}) for f in (times.log_normal, times.logit_normal) for m in (np.inf, 1e3)),
        *((f, {"std": s}) for f in (times.log_normal, times.logit_normal) for s in (0, -1, np.inf)),
    ],
)
def test_options_that_flip_or_collapse_times_are_refused(distribution, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        distribution(U, FLOW, **options)


def test_log_normal_stays_finite_at_its_widest():
    for schedule in (schedules.EDM(), schedules.VE(), schedules.cosine(), FLOW, schedules.VPSDE()):
        t = times.log_normal(jnp.array([2.0**-24, 1 - 2.0**-24]), schedule, mean=30.0, std=30.0)
        assert jnp.isfinite(t).all() and t[1] == schedule.t_max
