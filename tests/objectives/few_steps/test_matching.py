"""Students that match distributions: of a Gaussian, whose gradients are known; and of points."""

from functools import cache, partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import FLOW, MEAN, STD, levels
from linear_run import assert_identical

from diffusion import ema, predictions
from diffusion.denoiser import thousand_t
from diffusion.levels import NoiseLevel
from diffusion.models.mlp import MLP
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.few_steps.critics import Inner
from diffusion.objectives.few_steps.drifting import drift
from diffusion.objectives.few_steps.matching import (
    DistributionMatching,
    Made,
    ScoreIdentity,
    generate,
)
from diffusion.objectives.few_steps.student import TEACHER, Student
from diffusion.objectives.objective import Context
from diffusion.training import loop, optimizers, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step


class Shift(nn.Module):
    """The velocity of the one-step generator x = mu + s z."""

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        mu = self.param("mu", nn.initializers.zeros, ())
        return x / time[:, None] - (mu + STD * x / time[:, None]) / time[:, None]


def gaussian(params):
    """The exact denoiser of N(m, s^2)."""

    mean = params["network"]["m"]

    def denoise(x, level, cond):
        level = level.expand(x.ndim)
        gain = level.alpha * STD**2 / ((level.alpha * STD) ** 2 + level.sigma**2)
        return mean + gain * (x - level.alpha * mean)

    return denoise


def matched(method, t, mu):
    """The method's gradient in mu of generators N(mu, s^2) at one time, per example's distance to
    the teacher's estimate, which both losses divide by; float64."""
    objective = Student(
        Shift(), FLOW, predictions.flow, lambda level: level.t, method=method, teacher=gaussian
    )
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        z, noise = jnp.asarray(rng.normal(size=(2, 64, 1)))
        frozen = {TEACHER: {"network": {"m": jnp.float64(MEAN)}}}
        critics = {"fake": {"m": jnp.float64(mu - MEAN)}}
        context = Context(frozen)
        drawn = objective.draw({"x": z}, jax.random.key(0))
        level = NoiseLevel(*(jnp.full(64, leaf) for leaf in levels(t)))

        def loss(mu):
            x = mu + STD * z
            return method.matched(objective, critics, Made(drawn, context, x, noise, level))[0]

        x = mu + STD * z
        x_t = level.expand(2).alpha * x + level.expand(2).sigma * noise
        away = jnp.abs(x - gaussian(frozen[TEACHER])(x_t, level, None))
        return float(jax.grad(loss)(jnp.float64(mu)) / jnp.mean(1 / away))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_mean_moves_as_the_divergence_says(t):
    """(mu - m) sigma^2 / v^2 of matching; sigma^2 / v^2 of that, once more, of score identity."""
    level, mu = levels(t), 1.1
    share = level.sigma**2 / ((level.alpha * STD) ** 2 + level.sigma**2)
    assert matched(DistributionMatching(), t, mu) == pytest.approx((mu - MEAN) * share, abs=1e-10)
    found = matched(ScoreIdentity(alpha=0.7), t, mu)
    assert found == pytest.approx((mu - MEAN) * share**2, abs=1e-10)
    assert matched(DistributionMatching(), t, MEAN) == pytest.approx(0, abs=1e-12)


class Counting(nn.Module):
    """The velocity of f(x, t) = a(t), a number of each of ``steps`` times."""

    steps: int

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        a = self.param("a", lambda key: jnp.arange(1.0, self.steps + 1))
        k = jnp.round(time * self.steps).astype(int) - 1
        return (x - a[k][:, None]) / time[:, None]


def test_backward_simulation_ends_at_one_node_and_has_no_gradient_before_it():
    objective = Student(
        Counting(4), FLOW, predictions.flow, lambda level: level.t, method=DistributionMatching(4)
    )
    params = {"network": {"a": jnp.arange(1.0, 5.0)}}

    @jax.jit
    def ends(key, index):
        drawn = objective.draw({"x": jnp.zeros((len(index), 1)), "index": index}, key)

        def total(params):
            x = generate(objective, params, drawn, Context(), 4)
            return x.sum(), x

        slopes, x = jax.grad(total, has_aux=True)(params)
        return x[:, 0], slopes["network"]["a"]

    seen = set()
    for i in range(20):
        x, slopes = ends(jax.random.key(i), jnp.arange(6))
        assert np.ptp(x) < 1e-5
        node = round(float(x[0]))
        np.testing.assert_allclose(slopes, 6.0 * (np.arange(1, 5) == node), atol=1e-4)
        other, _ = ends(jax.random.key(i), jnp.arange(6, 12))  # those of another device
        assert round(float(other[0])) == node
        seen.add(node)
    assert seen == {1, 2, 3, 4}


class Copy(nn.Module):
    """f(x, t) = x: the sample is what was simulated."""

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("a", nn.initializers.zeros, ())
        return jnp.zeros_like(x)


def test_backward_simulation_adds_new_noise_to_the_estimate():
    """From x ~ N(0, 1) at t = 1, f = x, to t = 1/2: x / 2 + eps / 2, of variance 1/2."""
    objective = Student(Copy(), FLOW, predictions.flow, lambda level: level.t)
    params = {"network": {"a": jnp.zeros(())}}
    variances = set()
    for i in range(8):
        drawn = objective.draw({"x": jnp.zeros((4000, 1))}, jax.random.key(i))
        x = generate(objective, params, drawn, Context(), 2)
        variances.add(round(float(x.var()), 1))
    assert variances == {1.0, 0.5}


SETTINGS = (MLP(width=16, depth=2), FLOW, predictions.flow, thousand_t)
TAUGHT = Denoising(*SETTINGS)


def points(step, size=32):
    x = np.random.default_rng(step).normal(size=(size, 2)).astype(np.float32)
    return {
        "x": x @ np.array([[0.5, 0.2], [0, 0.3]], np.float32),
        "index": np.arange(size, dtype=np.int32),
    }


def random(shapes, seed):
    """Parameters none of which is zero, so that every layer acts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.3 * rng.normal(size=a.shape).astype(np.float32), shapes)


LEARNED = random(jax.eval_shape(TAUGHT.init, jax.random.key(0), points(0)), 0)
FROZEN = {TEACHER: LEARNED}


def student(method):
    network, _, prediction, c_noise = SETTINGS
    return Student(
        *SETTINGS,
        method=method,
        teacher=TAUGHT.denoiser,
        extract=Inner(network, prediction, c_noise, None, (1,)),
        frozen=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), FROZEN),
    )


EVERY = 3
GAN = student(DistributionMatching(2, every=EVERY, adversary=1e-2))
ADAM = optimizers.make("adamw", 1e-2, warmup=2, weight_decay=0.1, clip_norm=1.0)
EMAS = {"ema": ema.constant(0.9), "power": ema.power_function(0.1)}
KEY = jax.random.key(1)


@cache
def step_of(layout="pmap", devices=1, accumulate=1, optimizer=ADAM):
    chosen = jax.devices()[:devices]
    return make_train_step(
        GAN, optimizer, EMAS, accumulate=accumulate, devices=chosen, parallel=layout
    )


def trained(steps, batch=points, optimizer=ADAM, layout="pmap", devices=1, accumulate=1):
    """The states after each step, and the last metrics."""
    placed = parallel.make(layout, jax.devices()[:devices])
    params = jax.jit(GAN.init)(KEY, points(0)) | LEARNED
    state = parallel.place(placed, create(GAN, optimizer, EMAS, KEY, points(0), params))
    frozen = parallel.place(placed, FROZEN)
    states = [jax.device_get(state)]
    for i in range(steps):
        given = parallel.place_batch(placed, batch(i))
        state, metrics = step_of(layout, devices, accumulate, optimizer)(state, frozen, given, KEY)
        states.append(jax.device_get(state))
    return states, metrics


def own(state, names):
    """What belongs to the parameters of these names: themselves, averages and Adam's moments."""
    moments = state.opt_state[1][0]
    trees = [state.params, *state.ema.values(), moments.mu, moments.nu]
    return [{name: tree[name] for name in names} for tree in trees]


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_the_student_moves_at_every_third_step_and_the_critics_at_each():
    states, metrics = trained(6)
    for i, (before, after) in enumerate(pairwise(states)):
        mine = own(before, ["network"]), own(after, ["network"])
        if (i + 1) % EVERY:
            assert_identical(*mine)
        else:
            assert all(differ(*pair) for pair in zip(*mine))
        for name in ("fake", "head"):
            assert all(differ(a, b) for a, b in zip(own(before, [name]), own(after, [name])))
        assert after.step == after.opt_state[1][0].count == i + 1
    assert metrics["student"].weight == 1 and metrics["finite"] == 1


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


SGD = optimizers.make("sgd", 0.05)


@pytest.mark.parametrize("layout", [{"devices": 1}, {"devices": 4, "layout": "fsdp"}])
def test_layouts_and_pieces_train_alike(layout, monkeypatch):
    """Four devices at once; one, or four with parameters cut, each in two pieces."""
    monkeypatch.setattr(parallel, "SMALL", 64)  # so that fsdp cuts something
    expected, metrics = trained(3, optimizer=SGD, devices=4)
    found, others = trained(3, optimizer=SGD, accumulate=2, **layout)
    assert_close(expected[-1].params, found[-1].params)
    assert_close(expected[-1].ema, found[-1].ema)
    assert float(metrics["loss"]) == pytest.approx(float(others["loss"]), rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing():
    def poisoned(step):
        batch = points(step)
        if step == 2:
            batch["x"][3] = np.nan  # which the discriminator sees
        return batch

    states, metrics = trained(3, poisoned)
    assert metrics["finite"] == 0
    assert_identical(states[2].replace(step=np.int32(3)), states[3])


def test_a_run_that_is_stopped_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", lambda *_, **__: step_of())

    def batches(start):
        yield from (points(i) for i in range(start, 100))

    def run(workdir, steps):
        return loop.fit(
            objective=GAN,
            optimizer=ADAM,
            emas=EMAS,
            batches=batches,
            steps=steps,
            workdir=workdir,
            frozen=FROZEN,
            log_every=2,
            checkpoint_every=2,
            devices=jax.devices()[:1],
        )

    whole = run(tmp_path / "whole", 7)
    for steps in (2, 4, 7):  # between two of the student's updates, and after one
        parts = run(tmp_path / "parts", steps)
    assert_identical(whole, parts)


def test_where_distributions_agree_nothing_drifts():
    with jax.enable_x64(True):
        x, p, n = np.random.default_rng(0).normal(size=(3, 40, 2))
        assert np.abs(drift(x, p, p, 0.3)).max() < 1e-13
        np.testing.assert_allclose(drift(x, p, n, 0.3), -drift(x, n, p, 0.3), atol=1e-13)
        both = partial(drift, x, tau=0.3)
        assert np.abs(both(p, n)).max() > 1e-3


def test_points_drift_to_the_data():
    """A cloud beside the data, moved along the drift, gets among them."""
    rng = np.random.default_rng(0)
    x, data = rng.normal(size=(2, 200, 2)) * 0.1
    x = jnp.asarray(x + 0.3)
    for _ in range(30):
        x = x + drift(x, data, x, 0.3, own=True)
    assert np.abs(np.asarray(x).mean(0) - data.mean(0)).max() < 0.05
    assert np.asarray(x).std() == pytest.approx(0.1, rel=0.3)
