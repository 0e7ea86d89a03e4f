"""Prior preservation: the loss of both halves by hand, in one piece and in several."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import ema, predictions, schedules
from diffusion.denoiser import thousand_t
from diffusion.objectives import weightings
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.objective import Context
from diffusion.objectives.terms.prior import PriorPreservation
from diffusion.objectives.terms.uncertainty import Uncertainty
from diffusion.training import optimizers, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

KEY, SIZE = jax.random.key(1), 16
BATCH = {
    "x": np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32),
    "prior": np.tile(np.float32([0, 1]), SIZE // 2),
    "index": np.arange(SIZE, dtype=np.int32),
}


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, time, cond, train=False):
        return nn.Dense(3)(x)


OBJECTIVE = Denoising(
    Linear(),
    schedules.cosine(),
    predictions.eps,
    thousand_t,
    weighting=partial(weightings.min_snr, gamma=5.0),
    terms=(PriorPreservation(0.7),),
)
PARAMS = OBJECTIVE.init(jax.random.key(0), BATCH)


def each(weighting):
    """The loss of each example [B] without the term."""
    plain = dataclasses.replace(OBJECTIVE, terms=(), weighting=weighting)

    def one(i):
        own = {name: values[i : i + 1] for name, values in BATCH.items()}
        return plain.loss(PARAMS, Context(), own, KEY)[0]

    return np.array([one(i) for i in range(SIZE)])


def test_the_class_has_its_mean_without_the_weighting():
    weighted, distances = each(OBJECTIVE.weighting), each(weightings.simple)
    assert not np.allclose(weighted, distances)
    expected = weighted[::2].mean() + 0.7 * distances[1::2].mean()
    loss, metrics = OBJECTIVE.loss(PARAMS, Context(), BATCH, KEY)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    found = {name: m.total / m.weight for name, m in metrics.items() if name.endswith("_loss")}
    assert float(found["subject_loss"]) == pytest.approx(weighted[::2].mean(), rel=1e-6)
    assert float(found["prior_loss"]) == pytest.approx(distances[1::2].mean(), rel=1e-6)
    # In validation there is no class.
    plain = OBJECTIVE.loss(PARAMS, Context(train=False), BATCH, KEY)[0]
    assert float(plain) == pytest.approx(weighted.mean(), rel=1e-6)


def test_terms_before_it_act_on_the_subject_alone():
    both = dataclasses.replace(OBJECTIVE, terms=(Uncertainty(), *OBJECTIVE.terms))
    params = both.init(jax.random.key(0), BATCH)
    bias = params["uncertainty"]["Dense_0"]["bias"]
    params["uncertainty"]["Dense_0"]["bias"] = bias + 0.5
    params["network"] = PARAMS["network"]
    weighted, distances = each(OBJECTIVE.weighting), each(weightings.simple)
    expected = (weighted[::2] * np.exp(-0.5) + 0.5).mean() + 0.7 * distances[1::2].mean()
    loss = both.loss(params, Context(), BATCH, KEY)[0]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name, accumulate", [("pmap", 1), ("pmap", 2), ("fsdp", 2)])
def test_pieces_make_the_same_step(name, accumulate):
    sgd, emas = optimizers.make("sgd", 0.1, b1=0.0), {"ema": ema.constant(0.5)}
    layout = parallel.make(name, jax.devices()[:2])
    options = {"accumulate": accumulate, "devices": jax.devices()[:2], "parallel": name}
    step = make_train_step(OBJECTIVE, sgd, emas, **options)
    start = jax.tree.map(jnp.copy, PARAMS)
    state = parallel.place(layout, create(OBJECTIVE, sgd, emas, KEY, BATCH, start))
    key = jax.random.fold_in(KEY, 0)
    grads = jax.grad(lambda p: OBJECTIVE.loss(p, Context(), BATCH, key)[0])(PARAMS)
    state, metrics = step(state, None, parallel.place_batch(layout, BATCH), KEY)
    for path, made in jax.tree_util.tree_leaves_with_path(state.params):
        old, gradient = (
            dict(jax.tree_util.tree_leaves_with_path(t))[path] for t in (PARAMS, grads)
        )
        np.testing.assert_allclose(made, old - 0.1 * gradient, rtol=1e-5, atol=1e-6)
    assert metrics["prior_loss"].weight == metrics["subject_loss"].weight == 0.5


def test_impossible_weights_are_refused():
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, got -1"):
        PriorPreservation(-1.0)
