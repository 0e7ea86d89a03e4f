"""Reflow of a Gaussian: pairs of a flow lie on lines that do not cross, and are learned exactly."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import MEAN, PARAMS, STD, student

from diffusion.objectives.few_steps.reflow import Reflow
from diffusion.objectives.objective import Context


class Straight(nn.Module):
    """z - x_0 on the line from z to x_0 = m + s z, as a function of the point and the time."""

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        t = time[:, None]
        z = (x - (1 - t) * MEAN) / ((1 - t) * STD + t)
        return z - MEAN - STD * z


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("paired", [True, False])
def test_the_flow_of_pairs_is_straight(one_step, paired):
    """Its velocity has no loss on the pairs; beside other noise, which crosses, it has."""
    objective = student(Reflow(one_step=one_step), network=Straight(), t_min=1e-3)
    with jax.enable_x64(True):
        noise = np.random.default_rng(0).normal(size=(512, 2))
        batch = {"x": MEAN + STD * noise} | ({"noise": noise} if paired else {})
        params = jax.tree.map(jnp.float64, PARAMS)
        loss, _ = objective.loss(params, Context(), batch, jax.random.key(0))
    assert float(loss) < 1e-20 if paired else float(loss) > 0.1
    levels = objective.levels(jax.random.key(0), jnp.arange(512))
    assert np.all(levels.t == 1) == one_step
