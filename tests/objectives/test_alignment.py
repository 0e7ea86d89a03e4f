"""Representation alignment: its value at known angles, and which parameters it reaches."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import ema, predictions, schedules
from diffusion.conditioning import Conditioning
from diffusion.denoiser import thousand_t
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.objective import Context
from diffusion.objectives.terms.alignment import Alignment, Projector
from diffusion.objectives.terms.term import Noised
from diffusion.training import optimizers, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

KEY = jax.random.key(1)
BATCH = {
    "x": np.random.default_rng(0).normal(size=(8, 4, 4, 1)).astype(np.float32),
    "index": np.arange(8, dtype=np.int32),
}


class Chain(nn.Module):
    """A network of three blocks, whose tokens can be asked for."""

    @nn.compact
    def __call__(self, x, time, cond, train=False, features=()):
        h, tokens = nn.Dense(4, name="first")(x) + 0.001 * time[:, None, None, None], []
        for i in (1, 2, 3):
            h = jnp.tanh(nn.Dense(4, name=f"block_{i}")(h))
            tokens.append(h)
        out = nn.Dense(1, name="last")(h)
        return (out, tuple(tokens[i - 1] for i in features)) if features else out


class Same(nn.Module):
    """No projection."""

    def __call__(self, x):
        return x


def encode(params, images, grid):
    """Features of 2 x 2 patches, whatever the grid."""
    return images[:, ::2, ::2] * params["scale"]


FROZEN = {"alignment": {"scale": jnp.array([1.0, -2.0, 0.5])}}


ALIGNMENT = Alignment(encode, Projector(3, 5), 2)
PLAIN = Denoising(Chain(), schedules.cosine(), predictions.v, thousand_t)


def aligned(**changes):
    return dataclasses.replace(PLAIN, terms=(dataclasses.replace(ALIGNMENT, **changes),))


PARAMS = aligned().init(KEY, BATCH)


@cache
def gradient(objective):
    def loss(params, frozen, step):
        return objective.loss(params, Context(frozen, step=step), BATCH, KEY)[0]

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def gradients(objective, step=0):
    """Of the parameters and of the frozen ones."""
    return gradient(objective)(PARAMS, FROZEN, step)


def assert_close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize(
    "turned, expected",
    [
        (lambda x: 3 * x, -0.5),
        (lambda x: -x, 0.5),
        (lambda x: jnp.stack([x[..., 1], -x[..., 0]], axis=-1), 0.0),
        (lambda x: x + jnp.stack([x[..., 1], -x[..., 0]], axis=-1), -0.5 / 2**0.5),
    ],
)
def test_the_loss_is_the_cosine(turned, expected):
    tokens = jax.random.normal(KEY, (5, 4, 4, 2))
    alignment = Alignment(lambda params, x, grid: turned(x), Same(), 1)
    noised = Noised({"x": tokens}, None, None, None, None, {1: tokens})
    before = jnp.arange(5.0)
    loss, metrics = alignment(before, {}, Context({"alignment": {}}), noised)
    np.testing.assert_allclose(loss - before, expected, atol=1e-6)
    assert float(metrics["alignment"]) == pytest.approx(-2 * expected, abs=1e-6)


def test_features_are_stretched_to_the_tokens_and_latents_have_images_beside_them():
    tokens = jnp.broadcast_to(jnp.arange(6.0)[None, :, None, None] - 2.5, (2, 6, 4, 1))
    coarse = jnp.array([-1.0, 1.0])[None, :, None, None] * jnp.ones((2, 2, 2, 1))
    alignment = Alignment(lambda params, x, grid: x, Same(), 1)
    latents = {"x": jnp.full((2, 3, 3, 4), jnp.nan), "clean": coarse}
    similarity = alignment.similarity({}, tokens, latents, {"alignment": {}})
    np.testing.assert_allclose(similarity, 1.0, atol=1e-6)


def test_what_lies_above_the_block_the_encoder_and_sampling_know_nothing_of_it():
    (with_it, encoder), (without, _) = (gradients(aligned(weight=w)) for w in (1.0, 0.0))
    assert not np.any(encoder["alignment"]["scale"])
    for name in ("block_3", "last"):
        assert_close(with_it["network"][name], without["network"][name])
    for name in ("first", "block_1", "block_2"):
        kernels = (g["network"][name]["kernel"] for g in (with_it, without))
        assert np.abs(np.subtract(*kernels)).max() > 1e-3, name
    assert all(np.any(g) for g in jax.tree.leaves(with_it["alignment"]))
    assert not any(np.any(g) for g in jax.tree.leaves(without["alignment"]))
    level = PLAIN.schedule(jnp.full(8, 0.5))
    images = [o.denoiser(PARAMS)(jnp.asarray(BATCH["x"]), level, Conditioning())
              for o in (PLAIN, aligned())]  # fmt: skip
    np.testing.assert_array_equal(*images)


def test_without_weight_or_after_the_stop_training_is_plain():
    plain, stopping = gradients(PLAIN)[0]["network"], aligned(weight=1.0, stop=10)
    for grads in (
        gradients(aligned(weight=0.0))[0],
        gradients(stopping, step=10)[0],
    ):
        assert_close(grads["network"], plain)
        assert not any(np.any(g) for g in jax.tree.leaves(grads["alignment"]))
    before = gradients(stopping, step=9)[0]
    assert_close(before, gradients(aligned(weight=1.0))[0])
    assert all(np.any(g) for g in jax.tree.leaves(before["alignment"]))
    # Nor does the loss on held-out data need the encoder.
    losses = [jax.jit(lambda p, o=o: o.loss(p, Context(train=False), BATCH, KEY)[0])(PARAMS)
              for o in (PLAIN, stopping)]  # fmt: skip
    assert losses[0] == losses[1]


def test_the_network_starts_as_without_it():
    jax.tree.map(
        np.testing.assert_array_equal, PLAIN.init(KEY, BATCH)["network"], PARAMS["network"]
    )


def test_layouts_train_alike():
    objective, sgd = aligned(stop=5), optimizers.make("sgd", 0.1, b1=0.0)
    emas, found = {"ema": ema.constant(0.5)}, []
    for name in parallel.NAMES:
        layout = parallel.make(name)
        state = create(objective, sgd, emas, KEY, BATCH, jax.tree.map(jnp.copy, PARAMS))
        state, frozen = parallel.place(layout, (state, FROZEN))
        step = make_train_step(objective, sgd, emas, parallel=name)
        state, metrics = step(state, frozen, parallel.place_batch(layout, BATCH), KEY)
        found.append((state.ema["ema"], metrics["alignment"]))
    assert abs(float(found[0][1])) > 1e-3
    assert_close(*found, atol=1e-5)
