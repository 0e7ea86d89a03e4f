"""Couplings against SciPy's assignment, and what they do to the noise's distribution."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linear_sum_assignment
from test_denoising import PointMass, affine_objective, batch_of, time_itself

from diffusion import predictions, schedules
from diffusion.objectives.couplings import independent, nearest, optimal_transport
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.noise import Gaussian
from diffusion.objectives.objective import Context
from diffusion.training import optimizers, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

KEY = jax.random.key(3)
X0 = jax.random.normal(jax.random.key(0), (24, 2, 3, 1)) + 0.5
LABEL = jnp.arange(24) % 3


def draw(j, shape=X0.shape):
    return jax.random.normal(jax.random.fold_in(KEY, j), shape)


@partial(jax.jit, static_argnames=("group", "same_label"))
def handed_out(x0, label=None, group=0, same_label=False):
    return optimal_transport(x0, draw, label, group=group, same_label=same_label)


def cost(x0, noise):
    return np.square(np.asarray(x0)[:, None] - np.asarray(noise)[None]).sum((2, 3, 4))


def least(costs):
    rows, columns = linear_sum_assignment(costs)
    return costs[rows, columns].sum()


@pytest.mark.parametrize("group", [0, 8])
def test_the_assignment_is_the_least_that_there_is(group):
    size, noise = group or 24, draw(0)
    found = handed_out(X0, group=group)
    paid, best, as_drawn = np.diag(cost(X0, found)), 0.0, np.diag(cost(X0, noise))
    for k in range(0, 24, size):
        part = slice(k, k + size)
        # A permutation: the same noises, each once, within the group.
        np.testing.assert_allclose(
            np.sort(np.asarray(found[part]).reshape(size, -1), axis=0),
            np.sort(np.asarray(noise[part]).reshape(size, -1), axis=0),
            rtol=1e-6,
        )
        best += least(cost(X0[part], noise[part]))
    assert paid.sum() == pytest.approx(best, rel=1e-5)
    assert best < 0.9 * as_drawn.sum()


def test_the_scale_of_the_data_does_not_matter():
    np.testing.assert_array_equal(handed_out(X0), handed_out(0.01 * X0))


def test_within_a_label_noise_stays_as_it_was():
    found, noise = handed_out(X0, LABEL, same_label=True), draw(0)
    for label in range(3):
        mine = np.asarray(LABEL) == label
        assert np.diag(cost(X0[mine], found[mine])).sum() == pytest.approx(
            least(cost(X0[mine], noise[mine])), rel=1e-5
        )
    # Labels that tell where the data are tell nothing of the noise; without the option they do.
    many = 600
    label = jnp.arange(many * 24) % 2
    x0 = jnp.where(label == 1, 3.0, -3.0)[:, None, None, None]
    noises = jax.random.normal(KEY, x0.shape)
    means = {}
    for same in (False, True):
        found = jax.jit(
            lambda x, y, s=same: optimal_transport(x, lambda _: noises, y, group=24, same_label=s)
        )(x0, label)
        means[same] = float(found[label == 1].mean() - found[label == 0].mean())
    assert means[False] > 1.4  # of halves of the normal distribution: 2 sqrt(2 / pi) = 1.6
    assert abs(means[True]) < 0.06


@pytest.mark.parametrize("center", [0.0, 1.5])
def test_the_nearest_has_its_distribution(center):
    x0 = jnp.full((4000, 3), center)
    found = jax.jit(lambda x: nearest(x, lambda j: draw(j, x.shape), k=3))(x0)
    squared = np.square(found - x0).sum(1)
    one = stats.ncx2(3, 3 * center**2) if center else stats.chi2(3)
    assert stats.kstest(squared, lambda d: 1 - one.sf(d) ** 3).pvalue > 1e-3
    assert stats.kstest(squared, one.cdf).pvalue < 1e-6
    np.testing.assert_array_equal(nearest(x0, lambda j: draw(j, x0.shape), k=1), draw(0, x0.shape))


@partial(jax.jit, static_argnums=(0, 3))
def loss(objective, params, batch, train=True):
    return objective.loss(params, Context(train=train), batch, KEY)[0]


def test_the_perfect_network_has_no_loss():
    """The point mass's x_t determines its noise, whichever that is."""
    schedule, prediction = schedules.RectifiedFlow(), predictions.flow
    network = PointMass(0.4, schedule, prediction)
    objective = Denoising(
        network, schedule, prediction, time_itself, coupling=optimal_transport, t_min=0.01
    )
    params, x = {"network": {"unused": jnp.zeros(1)}}, np.full((16, 3), 0.4, np.float32)
    assert float(loss(objective, params, {"x": x})) < 1e-6
    assert float(loss(objective, params, {"x": x + 0.5})) > 1e-3


AFFINE = affine_objective(coupling=nearest, noise=Gaussian(offset=0.1))
PARAMS = AFFINE.init(KEY, batch_of(8))


def test_the_nearest_does_not_depend_on_how_the_batch_is_split():
    parts = (slice(0, 8), slice(0, 4), slice(4, 8))
    whole, *halves = (
        float(loss(AFFINE, PARAMS, {k: v[part] for k, v in batch_of(8).items()})) for part in parts
    )
    assert whole == pytest.approx(np.mean(halves), rel=1e-6)


def test_only_training_couples():
    plain, batch = dataclasses.replace(AFFINE, coupling=independent), batch_of(8)
    trained, held_out = ([float(loss(o, PARAMS, batch, train)) for o in (plain, AFFINE)]
                         for train in (True, False))  # fmt: skip
    assert trained[0] == pytest.approx(held_out[0], rel=1e-6)
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)
    assert abs(trained[1] / trained[0] - 1) > 1e-3


def test_layouts_and_pieces_train_alike():
    objective = affine_objective(coupling=partial(optimal_transport, group=2))
    sgd, batch = optimizers.make("sgd", 0.1, b1=0.0), batch_of(16)
    found = []
    for name, accumulate in (("pmap", 2), ("fsdp", 1)):
        layout = parallel.make(name)
        state = parallel.place(layout, create(objective, sgd, {}, KEY, batch))
        step = make_train_step(objective, sgd, {}, accumulate=accumulate, parallel=name)
        args = state, None, parallel.place_batch(layout, batch), KEY
        compiled = step.lower(*args).compile()
        if name == "fsdp":  # no device waits for others within the assignment's loops
            blocks = re.split(r"\n(?=\S)", compiled.as_text())
            waits = [b for b in blocks if re.search(r" (all-\w+|collective-\w+)\(", b)]
            assert len(waits) == 1 and waits[0].startswith("ENTRY")
        found.append(compiled(*args)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)


def test_errors():
    with pytest.raises(ValueError, match=r"group=10 does not divide the 24 .*; nearest: 8 or 12"):
        handed_out(X0, group=10)
    with pytest.raises(ValueError, match="same_label=True needs labels"):
        handed_out(X0, same_label=True)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 256\], got 0"):
        nearest(X0, draw, k=0)
