"""Consistency models of a Gaussian, whose flow, denoiser and best fit are known."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_denoising import affine_objective, time_itself

from diffusion import predictions, schedules
from diffusion.data import densities
from diffusion.denoiser import thousand_t
from diffusion.evaluation.metrics.samples import sliced_wasserstein
from diffusion.levels import NoiseLevel
from diffusion.models.mlp import MLP
from diffusion.objectives import consistency
from diffusion.objectives.consistency import Consistency
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.objective import Context
from diffusion.sampling import grids, solvers
from diffusion.sampling.sample import sample
from diffusion.training import optimizers, parallel
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


def exact_denoise(params, x, level, cond=None):
    level = level.expand(x.ndim)
    gain = level.alpha * STD**2 / spread(level) ** 2
    return MEAN + gain * (x - level.alpha * MEAN)


class ExactConsistency(nn.Module):
    """The velocity x that makes x - sigma F the flow's end."""

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        level = FLOW(time)
        end = exact_flow(None, x, level, FLOW(jnp.zeros_like(time)))
        return (x - end) / level.expand(x.ndim).sigma


def objective_of(solver, **changes):
    return Consistency(
        ExactConsistency(),
        FLOW,
        predictions.flow,
        time_itself,
        stratify=512,
        teacher=lambda params: partial(exact_denoise, params),
        solver=solver,
        **changes,
    )


def loss_of(solver, nodes):
    """In float64; the noise is the same for every solver and number of nodes."""
    with jax.enable_x64(True):
        x = MEAN + STD * np.random.default_rng(0).normal(size=(512, 2))
        objective = objective_of(solver, nodes=nodes)
        params = {"network": {"unused": jnp.zeros(1)}}
        context = Context({"teacher": None}, {"ema": params})
        loss, metrics = jax.jit(lambda x: objective.loss(params, context, {"x": x}, KEY()))(x)
        np.testing.assert_allclose(metrics["loss_q"].weight, 0.25, atol=0.003)
        return float(loss)


def KEY():
    return jax.random.key(3)


def test_the_exact_function_and_flow_have_no_loss():
    assert loss_of(exact_flow, 18) < 1e-24  # the error's square
    assert loss_of(consistency.euler, 18) > 1e-8


@pytest.mark.parametrize(("solver", "order"), [(consistency.euler, 1), (consistency.heun, 2)])
def test_the_solvers_error_falls_as_its_order_says(solver, order):
    """A step of size 1 / N is wrong by N^-(order + 1), and the loss is the square of that."""
    coarse, fine = (loss_of(solver, nodes) for nodes in (32, 64))
    assert np.log2(coarse / fine) == pytest.approx(2 * (order + 1), abs=0.35)
