"""Consistency models of a Gaussian, whose flow, denoiser and best fit are known; and of points."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_denoising import time_itself

from diffusion import ema, predictions, schedules
from diffusion.conditioning import Conditioning
from diffusion.data import densities
from diffusion.denoiser import thousand_t
from diffusion.evaluation.metrics.wasserstein import sliced_wasserstein
from diffusion.models.mlp import MLP
from diffusion.objectives import consistency
from diffusion.objectives.consistency import Consistency
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.objective import Context
from diffusion.sampling import grids, solvers
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import optimizers
from diffusion.training.state import create
from diffusion.training.step import make_train_step

MEAN, STD = 0.3, 0.7
FLOW = schedules.RectifiedFlow()


def spread(level):
    """The deviation of x_t."""
    return jnp.sqrt((level.alpha * STD) ** 2 + level.sigma**2)


def exact_flow(denoise, x, now, after):
    """The probability flow from one level to another."""
    now, after = now.expand(x.ndim), after.expand(x.ndim)
    return after.alpha * MEAN + spread(after) / spread(now) * (x - now.alpha * MEAN)


def exact_denoise(params, x, level, cond):
    level = level.expand(x.ndim)
    gain = level.alpha * STD**2 / spread(level) ** 2
    return MEAN + gain * (x - level.alpha * MEAN)


class ExactConsistency(nn.Module):
    """The velocity that makes x - sigma F the flow's end."""

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        level = FLOW(time)
        end = exact_flow(None, x, level, FLOW(jnp.zeros_like(time)))
        return (x - end) / level.expand(x.ndim).sigma


def loss_of(solver, nodes):
    """In float64; the noise is the same for every solver and number of nodes."""
    with jax.enable_x64(True):
        x = MEAN + STD * np.random.default_rng(0).normal(size=(512, 2))
        objective = Consistency(
            ExactConsistency(),
            FLOW,
            predictions.flow,
            time_itself,
            stratify=512,
            teacher=lambda params: partial(exact_denoise, params),
            solver=solver,
            nodes=nodes,
        )
        params = {"network": {"unused": jnp.zeros(1)}}
        context, key = Context({"teacher": None}, {"ema": params}), jax.random.key(3)
        loss, metrics = jax.jit(lambda x: objective.loss(params, context, {"x": x}, key))(x)
        np.testing.assert_allclose(metrics["loss_q"].weight, 0.25, atol=0.003)
        return float(loss)


def test_the_exact_function_and_flow_have_no_loss():
    assert np.sqrt(loss_of(exact_flow, 18)) < 1e-12
    assert np.sqrt(loss_of(consistency.heun, 18)) > 1e-6


@pytest.mark.parametrize(("solver", "power"), [(consistency.euler, 4), (consistency.heun, 5)])
def test_the_loss_falls_as_the_solvers_order_says(solver, power):
    """A step of Euler is wrong by N^-2, and the loss is the square of that. Of Heun's steps, wrong
    by N^-3, the last is one of Euler's, which one in N examples sees."""
    coarse, fine = (loss_of(solver, nodes) for nodes in (32, 64))
    assert np.log2(coarse / fine) == pytest.approx(power, abs=0.3)


class Gains(nn.Module):
    """f(x, t_n) = a_n x at node n of N."""

    nodes: int

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        gains = self.param("a", nn.initializers.zeros, (self.nodes,))
        return gains[jnp.round(time * self.nodes).astype(int) - 1][:, None] * x


def test_consistency_training_of_a_gaussian_is_the_product_of_regressions():
    """f_n(x_n) = E[f_{n-1}(x_{n-1}) | x_n], so a_n = a_{n-1} Cov(x_{n-1}, x_n) / Var(x_n)."""
    nodes, count = 5, 2**16
    level = FLOW(np.arange(nodes + 1) / nodes)
    alpha, sigma = np.asarray(level.alpha), np.asarray(level.sigma)
    variance = (alpha * STD) ** 2 + sigma**2
    covariance = alpha[1:] * alpha[:-1] * STD**2 + sigma[1:] * sigma[:-1]
    expected = np.cumprod(covariance / variance[1:])

    objective = Consistency(
        Gains(nodes), FLOW, predictions.x0, time_itself, stratify=count, nodes=nodes
    )
    batch = {"x": (STD * np.random.default_rng(0).normal(size=(count, 2))).astype(np.float32)}

    @jax.jit
    def gradient(gains, target, key):
        context = Context(ema={"ema": {"network": {"a": target}}})
        return jax.value_and_grad(
            lambda a: objective.loss({"network": {"a": a}}, context, batch, key)[0]
        )(gains)

    # The loss of any student and target, and Newton's steps to the best student.
    student, target = np.linspace(0.9, 0.2, nodes), np.linspace(0.8, 0.4, nodes)
    before = np.append(1.0, target[:-1])
    squares = student**2 * variance[1:] + before**2 * variance[:-1]
    loss = (squares - 2 * student * before * covariance).mean()
    key = jax.random.key(0)
    assert float(gradient(student, target, key)[0]) == pytest.approx(loss, rel=0.02)
    gains = jnp.zeros(nodes)
    for i in range(nodes):  # each step brings one more node to its value
        slope = gradient(gains, gains, jax.random.fold_in(key, i))[1]
        gains = gains - slope * nodes / (2 * variance[1:])
    np.testing.assert_allclose(gains, expected, atol=0.015)


def test_nodes_follow_the_time_distribution():
    objective = Consistency(
        Gains(4), FLOW, predictions.flow, time_itself, times=lambda u, s: u**2, nodes=4
    )
    after, now = objective._neighbours(jnp.array([0.1, 0.3, 0.6, 0.99]))
    np.testing.assert_allclose(after.t, [0, 1 / 16, 1 / 4, 9 / 16], atol=1e-6)
    np.testing.assert_allclose(now.t, [1 / 16, 1 / 4, 9 / 16, 1], atol=1e-6)


def train(objective, steps, rate, params=None, frozen=None):
    """Averaged parameters after training on two moons."""
    optimizer = optimizers.make("adam", rate, warmup=20, decay="cosine", steps=steps)
    emas = {"ema": ema.constant(0.99)}
    x = densities.sample("two_moons", 128 * 50, np.random.default_rng(0)).astype(np.float32)
    batches = [{"x": part} for part in np.split(x, 50)]
    state = create(objective, optimizer, emas, jax.random.key(0), batches[0], params)
    step = make_train_step(objective, optimizer, emas, devices=jax.devices()[:1])
    for i in range(steps):
        state, _ = step(state, frozen, batches[i % 50], jax.random.key(1))
    return state.ema["ema"]


def distance(denoise, solver):
    keys = image_keys(0, np.arange(2000))
    cond = Conditioning()
    draw = jax.jit(lambda: sample(lambda x, level: denoise(x, level, cond), solver, keys, (2,)))
    fresh = densities.sample("two_moons", 2000, np.random.default_rng(1))
    return sliced_wasserstein(np.asarray(draw()), fresh)


def test_one_step_of_a_student_is_far_better_than_one_of_its_teacher():
    settings = (MLP(width=32, depth=2), FLOW, predictions.flow, thousand_t)
    teacher = Denoising(*settings, stratify=128)
    learned = train(teacher, 400, 3e-3)
    student = Consistency(*settings, stratify=128, teacher=teacher.denoiser, nodes=16)
    params = jax.tree.map(jnp.copy, learned)
    params = train(student, 300, 2e-3, params, {"teacher": learned})
    one, two = (grids.uniform(FLOW, steps) for steps in (1, 2))
    control = distance(teacher.denoiser(learned), solvers.euler(one))
    found = distance(student.denoiser(params), solvers.euler(one))
    assert found < 0.35 * control
    assert (
        distance(student.denoiser(params), solvers.consistency(two, sigma_min=0.0)) < 0.35 * control
    )
