"""Exact solutions have no tangent; the derivative of networks agrees with finite differences."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import MEAN, STD, denoise, exact_loss, levels, spread, student, taught

from diffusion import predictions, schedules
from diffusion.conditioning import Conditioning
from diffusion.denoiser import log_sigma
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.unet import UNet
from diffusion.objectives import times
from diffusion.objectives.few_steps.student import Student
from diffusion.objectives.few_steps.tangents import Continuous, MeanFlow, along
from diffusion.objectives.objective import Context


@pytest.mark.parametrize("warmup", [0, 1000])
def test_the_exact_consistency_function_has_no_tangent(warmup):
    found, metrics = exact_loss(taught(Continuous(warmup)), step=5000)
    assert metrics["tangent"] < 1e-12 and found < 1e-20


def test_from_examples_the_tangent_is_zero_in_mean():
    """v is then cos eps - sin x_0, whose mean, given x, is the exact velocity."""
    found, metrics = exact_loss(student(Continuous(0)), step=5000)
    assert metrics["tangent"] > 0.1

    def gradient(scale, key):
        objective = student(Continuous(0, c=1e6), network=Scaled(), stratify=None)
        x = MEAN + STD * jax.random.normal(jax.random.key(5), (100_000, 2))
        params = {"network": {"scale": jnp.zeros(())}}
        return jax.grad(lambda p: objective.loss(p, Context(step=5000), {"x": x}, key)[0])(params)[
            "network"
        ]["scale"]

    found = 1e6 * jax.jit(gradient)(0.0, jax.random.key(1))  # c makes the tangent linear
    assert abs(found) < 0.02


class Scaled(nn.Module):
    """The exact consistency function, and something else beside it that is scaled from 0 on."""

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        from exact import ExactFlowMap

        scale = self.param("scale", nn.initializers.zeros, ())
        exact = ExactFlowMap().apply({"params": {"unused": jnp.zeros(1)}}, x, time, cond)
        return exact + scale * jnp.sin(3 * x)


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.0])
def test_the_exact_mean_velocity_has_no_residual(apart):
    found, metrics = exact_loss(taught(MeanFlow(apart)))
    assert metrics["distance"] < 1e-20 and found < 1e-18


def test_of_an_improper_mean_velocity_the_residual_is_large():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x, time, cond, train=False):
            self.param("unused", nn.initializers.zeros, (1,))
            t = time[:, None]
            velocity = (x - denoise(x, schedules.RectifiedFlow()(time))) / t
            return velocity  # whatever the span

    assert exact_loss(taught(MeanFlow(1.0), network=Wrong()))[1]["distance"] > 1e-3
    assert exact_loss(taught(MeanFlow(0.0), network=Wrong()))[1]["distance"] < 1e-20


@pytest.mark.parametrize("improved", [False, True])
def test_the_variance_of_mean_flows_target(improved):
    """With the exact network and t, r of {0.8, 0.3}, the residual of the improved target is
    Var(v | z) at t. Along v itself, it is that times the squared slope of the flow from t to r."""

    def either(u, schedule):
        return jnp.where(u < 0.5, 0.3, 0.8)

    def variance(t):
        return 1 + STD**2 - (t - (1 - t) * STD**2) ** 2 / spread(levels(t)) ** 2

    objective = student(MeanFlow(1.0, improved=improved), times=either, stratify=None)
    found = exact_loss(objective, count=100_000)[1]["distance"]
    slope = 1 if improved else (spread(levels(0.3)) / spread(levels(0.8))) ** 2
    expected = variance(0.3) / 4 + variance(0.8) * (1 / 4 + slope / 2)
    assert found == pytest.approx(float(expected), rel=0.02)
    assert abs(slope - 1) > 0.1 or improved


def test_guidance_within_mean_flow_extrapolates():
    """omega v + (1 - omega) u(no label): for a network that ignores labels, at r = t, the target is
    omega v + (1 - omega) u, so that the residual against u is omega times as large."""
    options = {"null": lambda cond: cond}
    plain = exact_loss(student(MeanFlow(0.0), **options))[1]["distance"]
    doubled = exact_loss(student(MeanFlow(0.0, scale=2.0), **options))[1]["distance"]
    mixed = exact_loss(student(MeanFlow(0.0, scale=1.0, mix=0.5), **options))[1]["distance"]
    assert doubled == pytest.approx(4 * plain, rel=1e-9)
    assert mixed == pytest.approx(plain, rel=1e-9)


def test_other_schedules_and_predictions_see_the_same():
    """On EDM's schedule with its prediction, the same network in other coordinates."""

    class Exact(nn.Module):
        """F of EDM's prediction, such that the estimate is the end of the flow."""

        @nn.compact
        def __call__(self, x, time, cond, train=False):
            self.param("unused", nn.initializers.zeros, (1,))
            sigma = jnp.exp(4 * time)
            level = schedules.EDM()(sigma)
            c = predictions.precondition(
                partial(predictions.edm, sigma_data=STD), level.expand(x.ndim)
            )
            x = x / c.c_in
            end = MEAN + STD / jnp.sqrt(STD**2 + sigma**2)[:, None] * (x - MEAN)
            return (end - c.c_skip * x) / c.c_out

    objective = Student(
        Exact(),
        schedules.EDM(),
        partial(predictions.edm, sigma_data=STD),
        log_sigma,
        times=times.log_normal,
        stratify=512,
        std=STD,
        method=Continuous(0),
        teacher=lambda params: lambda x, level, cond: denoise(x, level),
    )
    assert exact_loss(objective, step=5000)[1]["tangent"] < 1e-10


UNET = UNet(
    widths=(8,), blocks=1, norm_groups=4, attention="self", mid_blocks=1, remat=True, two_times=True
)
DIT = DiT(width=16, depth=2, heads=2, patch=2, two_times=True, time_scale=0.01)
NETWORKS = {
    "mlp": (MLP(16, 2, two_times=True), (2,)),
    "unet, remat": (UNET, (4, 4, 1)),
    "dit": (DIT, (4, 4, 1)),
    "dit, remat and scan": (DIT.clone(remat=True, scan=True), (4, 4, 1)),
    "dit, rotary and qk-norm": (
        DIT.clone(positions="rotary", qk_norm=True, norm="rms", mlp="swiglu"),
        (4, 4, 1),
    ),
    "dit, bfloat16": (DIT.clone(dtype=jnp.bfloat16), (4, 4, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_derivatives_along_the_flow_and_their_gradients(name):
    """The product agrees with finite differences, and a loss with it in has a gradient."""
    network, shape = NETWORKS[name]
    keys = jax.random.split(jax.random.key(0), 4)
    x, v = (jax.random.normal(key, (2, *shape)) for key in keys[:2])
    t, cond = jnp.array([0.3, 0.6]), Conditioning(span=jnp.array([0.1, 0.5]))
    params = network.init(keys[2], x, t, cond)
    leaves, structure = jax.tree.flatten(params)
    noise = jax.random.split(keys[3], len(leaves))
    params = jax.tree.unflatten(
        structure,
        [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, noise)],
    )

    def field(x, t):
        return network.apply(params, x, t, cond)

    found = jax.jit(lambda x: along(field, x, t, v, jnp.ones(2)))(x)
    step = 3e-2 if "bfloat16" in name else 3e-3
    ahead, behind = (jax.jit(field)(x + h * v, t + h) for h in (step, -step))
    expected = (ahead - behind) / (2 * step)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=scale * (0.3 if "bfloat16" in name else 3e-3))

    objective = Student(
        network,
        schedules.RectifiedFlow(),
        predictions.flow,
        lambda level: level.t,
        method=MeanFlow(1.0),
    )
    loss = jax.jit(jax.grad(lambda p: objective.loss(p, Context(), {"x": x}, keys[0])[0]))
    gradient = loss({"network": params["params"]})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_no_gradient_flows_through_the_tangent():
    """The gradient is that of |u - goal|^2 with the goal held fixed."""
    objective = student(MeanFlow(1.0, power=0.0), network=Scaled())
    with jax.enable_x64(True):
        x = MEAN + STD * np.random.default_rng(0).normal(size=(64, 2))
        params = {"network": {"scale": jnp.asarray(0.3)}}

        def loss(params):
            return objective.loss(params, Context(), {"x": x}, jax.random.key(0))[0]

        slope = jax.grad(loss)(params)["network"]["scale"]
        h = 1e-5
        ahead, behind = (loss({"network": {"scale": jnp.asarray(0.3 + d)}}) for d in (h, -h))
    assert abs(float(slope) - float(ahead - behind) / (2 * h)) > 1e-3  # the goal moves as well
