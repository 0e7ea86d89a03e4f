"""Students of a Gaussian, whose flow, denoiser and best fit are known; and of points."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import FLOW, MEAN, STD, denoise, exact_loss, exact_step, flow, levels, student, taught

from diffusion import ema, predictions
from diffusion.conditioning import Conditioning
from diffusion.data import densities
from diffusion.denoiser import thousand_t
from diffusion.evaluation.metrics.wasserstein import sliced_wasserstein
from diffusion.models.mlp import MLP
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.few_steps import jumps
from diffusion.objectives.few_steps.pairs import Nodes, Segments, Trajectories
from diffusion.objectives.few_steps.regression import Consistency, GuidanceDistillation, Progressive
from diffusion.objectives.few_steps.shortcut import Shortcut
from diffusion.objectives.few_steps.student import Student
from diffusion.objectives.objective import Context
from diffusion.sampling import grids, solvers
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import optimizers
from diffusion.training.state import create
from diffusion.training.step import make_train_step


class ToSegments(nn.Module):
    """The exact mean velocity to the start of the segment, of ``count``."""

    count: int

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        end = jnp.floor((time - 1e-9) * self.count) / self.count
        return (x - flow(x, FLOW(time), FLOW(end))) / (time - end)[:, None]


@pytest.mark.parametrize(
    ("pairs", "network"),
    [(Nodes(18), None), (Segments(3, nodes=18), ToSegments(3)), (Trajectories(18), None)],
)
def test_the_exact_function_and_flow_have_no_loss(pairs, network, monkeypatch):
    heun, _ = exact_loss(taught(Consistency(pairs), network=network))
    assert np.sqrt(heun) > 1e-6
    monkeypatch.setitem(jumps.SOLVERS, "heun", exact_step)
    found, metrics = exact_loss(taught(Consistency(pairs), network=network))
    assert np.sqrt(found) < 1e-12
    np.testing.assert_allclose(metrics["loss_q"].weight, 0.25, atol=0.003)


@pytest.mark.parametrize(("solver", "power"), [("euler", 4), ("heun", 5)])
def test_the_loss_falls_as_the_solvers_order_says(solver, power):
    """A step of Euler is wrong by N^-2, and the loss is the square of that. Of Heun's steps, wrong
    by N^-3, the last is one of Euler's, which one in N examples sees."""
    coarse, fine = (exact_loss(taught(Consistency(Nodes(n), solver)))[0] for n in (32, 64))
    assert np.log2(coarse / fine) == pytest.approx(power, abs=0.3)


def test_a_jump_and_its_landing_are_inverse():
    x, d = np.random.default_rng(0).normal(size=(2, 5, 3))
    now, to = levels(np.linspace(0.5, 1, 5)), levels(np.linspace(0, 0.4, 5))
    y = jumps.jump(x, d, now, to)
    np.testing.assert_allclose(jumps.landing(x, y, now, to), d, atol=1e-12)
    np.testing.assert_allclose(
        y,
        jumps.jump(
            jumps.jump(x, d, now, levels(np.full(5, 0.45))), d, levels(np.full(5, 0.45)), to
        ),
    )


class Steps(nn.Module):
    """The network whose one step of DDIM is two of the exact denoiser's, of half the length."""

    steps: int

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        now, half, to = (FLOW(time - part / self.steps) for part in (0, 0.5, 1))
        y = jumps.euler(denoise, x, now, half)
        y = jumps.euler(denoise, y, half, to)
        return (x - jumps.landing(x, y, now, to)) / time[:, None]


def test_one_step_of_progressive_distillation_is_two_of_the_teachers():
    found, _ = exact_loss(taught(Progressive(4), network=Steps(4)))
    assert np.sqrt(found) < 1e-12
    assert exact_loss(taught(Progressive(4), network=Steps(8)))[0] > 1e-5


class Guided(nn.Module):
    """The velocity of a teacher whose guided estimate is (2 s - 1) D, with s in the condition."""

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        scale = (2 * cond.guidance - 1)[:, None]
        return (x - scale * denoise(x, FLOW(time))) / time[:, None]


def test_a_student_that_is_told_the_scale_learns_the_guided_estimate():
    """The teacher's estimate is D with label 1, and -D without: away + s (towards - away)."""

    def teacher(params):
        return lambda x, level, cond: (2.0 * cond.label - 1)[:, None] * denoise(x, level)

    objective = student(
        GuidanceDistillation(),
        network=Guided(),
        teacher=teacher,
        guidance=(1.0, 8.0),
        embeds_guidance=True,
        null=lambda cond: cond.replace(label=0 * cond.label),
    )
    with jax.enable_x64(True):
        x = MEAN + STD * np.random.default_rng(0).normal(size=(512, 2))
        context, batch = Context({"teacher": None}), {"x": x, "label": np.ones(512, np.int32)}
        params = {"network": {"unused": jnp.zeros(1)}}
        loss, _ = objective.loss(params, context, batch, jax.random.key(0))
        drawn = objective.draw(batch, jax.random.key(0)).cond.guidance
    assert float(loss) < 1e-24
    assert drawn.min() < 1.2 and drawn.max() > 7.8


def test_the_exact_flow_map_is_a_shortcut():
    """But for the velocity, whose target is an example, and the first half of the shortest steps,
    which follow the velocity."""
    errors = [exact_loss(student(Shortcut(n, share=1.0)))[1]["steps"].total for n in (16, 32)]
    assert errors[0] < 1e-2 and errors[1] < errors[0] / 4
    _, metrics = exact_loss(student(Shortcut(share=0.25)))
    assert metrics["steps"].weight == pytest.approx(0.25, abs=0.01)
    assert metrics["velocities"].weight == pytest.approx(0.75, abs=0.01)


class Gains(nn.Module):
    """f(x, t_n) = a_n x at node n of N."""

    nodes: int

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        gains = self.param("a", nn.initializers.zeros, (self.nodes,))
        return gains[jnp.round(time * self.nodes).astype(int) - 1][:, None] * x


def test_consistency_training_of_a_gaussian_is_ddim_and_a_product_of_regressions():
    """f_n(x_n) = E[f_{n-1}(x_{n-1}) | x_n], so a_n = a_{n-1} Cov(x_{n-1}, x_n) / Var(x_n); and
    each factor is a step of DDIM with the exact denoiser, of data without a mean."""
    nodes, count = 5, 2**16
    level = FLOW(np.arange(nodes + 1) / nodes)
    alpha, sigma = np.asarray(level.alpha), np.asarray(level.sigma)
    variance = (alpha * STD) ** 2 + sigma**2
    covariance = alpha[1:] * alpha[:-1] * STD**2 + sigma[1:] * sigma[:-1]
    expected = np.cumprod(covariance / variance[1:])

    keep = sigma[:-1] / sigma[1:]
    ddim = keep + (alpha[:-1] - alpha[1:] * keep) * alpha[1:] * STD**2 / variance[1:]
    np.testing.assert_allclose(np.cumprod(ddim), expected, rtol=1e-12)

    objective = Student(
        Gains(nodes),
        FLOW,
        predictions.x0,
        lambda level: level.t,
        stratify=count,
        method=Consistency(Nodes(nodes)),
    )
    batch = {"x": (STD * np.random.default_rng(0).normal(size=(count, 2))).astype(np.float32)}

    @jax.jit
    def gradient(gains, target, key):
        context = Context(ema={"ema": {"network": {"a": target}}})
        return jax.value_and_grad(
            lambda a: objective.loss({"network": {"a": a}}, context, batch, key)[0]
        )(gains)

    # The loss of any student and target, and Newton's steps to the best student.
    mine, target = np.linspace(0.9, 0.2, nodes), np.linspace(0.8, 0.4, nodes)
    before = np.append(1.0, target[:-1])
    squares = mine**2 * variance[1:] + before**2 * variance[:-1]
    loss = (squares - 2 * mine * before * covariance).mean()
    key = jax.random.key(0)
    assert float(gradient(mine, target, key)[0]) == pytest.approx(loss, rel=0.02)
    gains = jnp.zeros(nodes)
    for i in range(nodes):  # each step brings one more node to its value
        slope = gradient(gains, gains, jax.random.fold_in(key, i))[1]
        gains = gains - slope * nodes / (2 * variance[1:])
    np.testing.assert_allclose(gains, expected, atol=0.015)


def test_eighteen_steps_of_ddim():
    """The slope of a Gaussian without a mean and with s = 0.7, beside the flow's, s = .7."""
    level = levels(np.arange(19) / 18)
    variance = (level.alpha * STD) ** 2 + level.sigma**2
    covariance = level.alpha[1:] * level.alpha[:-1] * STD**2 + level.sigma[1:] * level.sigma[:-1]
    slope = np.prod(covariance / variance[1:])
    solver = solvers.ddim(grids.uniform(FLOW, 18))
    x = np.array([[0.0], [1.0]])
    ends = sample(denoise, solver, image_keys(0, np.arange(2)), (1,), x_init=x)
    assert float(ends[1, 0] - ends[0, 0]) == pytest.approx(slope, rel=1e-5)
    assert flow(x, levels(1.0), levels(0.0))[1, 0] - MEAN * (1 - 0) == pytest.approx(STD, rel=1e-6)


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
    student = Student(
        *settings, stratify=128, teacher=teacher.denoiser, method=Consistency(Nodes(16))
    )
    params = jax.tree.map(jnp.copy, learned)
    params = train(student, 300, 2e-3, params, {"teacher": learned})
    one, two = (grids.uniform(FLOW, steps) for steps in (1, 2))
    control = distance(teacher.denoiser(learned), solvers.euler(one))
    found = distance(student.denoiser(params), solvers.euler(one))
    assert found < 0.35 * control
    assert (
        distance(student.denoiser(params), solvers.consistency(two, sigma_min=0.0)) < 0.35 * control
    )
