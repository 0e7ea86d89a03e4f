"""With a linear autoencoder and a linear discriminator, whose gradients are done by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import ema
from diffusion.models.autoencoder import Gaussian
from diffusion.models.discriminator import hinge, vanilla
from diffusion.objectives import distances
from diffusion.objectives.kl_autoencoder import Adversary, Autoencoding, two_optimizers
from diffusion.runs.restore import restore_ema
from diffusion.training import loop, optimizers

SIZE, CHANNELS, BATCH, START = 2, 3, 4, 3
SHAPE = (BATCH, SIZE, SIZE, CHANNELS)


class LinearDecoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(CHANNELS, use_bias=False, name="conv_out")(z)


class LinearAutoencoder(nn.Module):
    """Each pixel by itself, through two numbers; latents are certain."""

    def setup(self):
        self.encoder = nn.Dense(2, use_bias=False)
        self.decoder = LinearDecoder()

    def encode(self, x, train=False):
        mean = self.encoder(x)
        return Gaussian(mean, jnp.full_like(mean, -60.0))

    def decode(self, z, train=False):
        return self.decoder(z)

    def __call__(self, x):
        return self.decode(self.encode(x).mean)


class LinearDiscriminator(nn.Module):
    """One logit per image."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="a")(x.reshape(len(x), -1))


OBJECTIVE = Autoencoding(
    LinearAutoencoder(),
    distance=distances.l2,
    kl_weight=0.0,
    adversary=Adversary(LinearDiscriminator(), weight=0.7, start=START),
)


def batch_of(step):
    x = np.random.default_rng(step).normal(size=SHAPE).astype(np.float32)
    return {"x": x, "index": np.arange(BATCH, dtype=np.int32)}


X = batch_of(0)["x"]
PARAMS = OBJECTIVE.init(jax.random.key(0), {"x": X})


def by_hand():
    """y, and the gradients of nll and of the adversarial term with respect to the last kernel."""
    encoder = np.asarray(PARAMS["network"]["encoder"]["kernel"], np.float64)
    decoder = np.asarray(PARAMS["network"]["decoder"]["conv_out"]["kernel"], np.float64)
    z = X.astype(np.float64) @ encoder
    y = z @ decoder
    d_nll = np.einsum("bhwi,bhwj->ij", z, 2 * (y - X) / X.size)
    a = np.asarray(PARAMS["adversary"]["a"]["kernel"], np.float64).reshape(SHAPE[1:])
    d_unreal = -np.einsum("bhwi,hwj->ij", z, a) / BATCH
    return y, d_nll, d_unreal


@jax.jit
def _gradient(params, batch):
    return jax.grad(OBJECTIVE.loss, has_aux=True)(params, None, batch, jax.random.key(1))


def gradient(step):
    return _gradient(PARAMS, {**batch_of(0), "step": jnp.int32(step)})


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_kernel():
    grads, metrics = gradient(START)
    y, d_nll, d_unreal = by_hand()
    weight = np.linalg.norm(d_nll) / (np.linalg.norm(d_unreal) + 1e-4)
    np.testing.assert_allclose(metrics["adaptive_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["reconstruction"], ((y - X) ** 2).mean(), rtol=1e-5)
    kernel = grads["network"]["decoder"]["conv_out"]["kernel"]
    np.testing.assert_allclose(kernel, d_nll + 0.7 * weight * d_unreal, rtol=1e-4, atol=1e-6)


def test_the_discriminator_only_learns_its_own_loss():
    """The hinge's gradient: of real images below 1, of reconstructions above -1."""
    grads, metrics = gradient(START)
    y = by_hand()[0].reshape(BATCH, -1)
    a = np.asarray(PARAMS["adversary"]["a"]["kernel"], np.float64)
    x = X.reshape(BATCH, -1)
    real, fake = x @ a, y @ a
    wanted = 0.5 * ((fake > -1) * y - (real < 1) * x).mean(0)
    np.testing.assert_allclose(grads["adversary"]["a"]["kernel"][:, 0], wanted, atol=1e-5)
    own = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    np.testing.assert_allclose(metrics["adversary"], own, rtol=1e-5)


def test_before_its_start_the_adversary_does_nothing():
    grads, metrics = gradient(START - 1)
    _, d_nll, _ = by_hand()
    kernel = grads["network"]["decoder"]["conv_out"]["kernel"]
    np.testing.assert_allclose(kernel, d_nll, rtol=1e-4, atol=1e-6)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads["adversary"]))
    assert metrics["adaptive_weight"] == 0


@pytest.mark.parametrize("loss", [hinge, vanilla])
def test_losses_of_discriminators(loss):
    real, fake = jnp.array([-0.5, 3.0]), jnp.array([0.2, -4.0])
    if loss is hinge:
        wanted = 0.5 * ((1.5 + 0) / 2 + (1.2 + 0) / 2)
    else:
        p = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))
        wanted = -0.5 * (np.log(p(real)).mean() + np.log(1 - p(fake)).mean())
    np.testing.assert_allclose(loss(real, fake), wanted, rtol=1e-5)


def test_learned_variance_and_divergence():
    """d/dl (r exp(-l) + l) at 0 is 1 - r; the divergence is per number of the image."""
    objective = dataclasses.replace(OBJECTIVE, adversary=None, learned_variance=True, kl_weight=0.5)
    params = {"network": PARAMS["network"], "log_variance": jnp.zeros(())}
    batch = {"x": X}
    (loss, metrics), grads = jax.jit(
        jax.value_and_grad(
            lambda p: objective.loss(p, None, batch, jax.random.key(0)), has_aux=True
        )
    )(params)
    error = ((by_hand()[0] - X) ** 2).mean()
    np.testing.assert_allclose(grads["log_variance"], 1 - error, rtol=1e-4)
    kl = objective.encode(params, X).kl().mean() / X[0].size
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(loss, error + 0.5 * kl, rtol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    make, made = loop.make_train_step, []

    def once(*args, **settings):
        made[:] = made or [make(*args, **settings)]
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", once)
        yield


def fit(workdir, steps, **changes):
    adam = lambda: optimizers.make("adamw", 0.05, weight_decay=0.1)
    settings = dict(
        objective=OBJECTIVE,
        optimizer=two_optimizers(adam(), adam(), START),
        emas={"ema": ema.constant(0.9)},
        batches=lambda start: (batch_of(k) for k in range(start, 100)),
        steps=steps,
        workdir=workdir,
        devices=jax.devices()[:1],
        keep=None,
    )
    return loop.fit(**settings | changes)


def test_training_starts_the_adversary_late_and_resumes_to_the_bit(tmp_path):
    seen = {}

    def note(state, step):
        seen[step] = jax.tree.map(np.array, (state.params, state.opt_state))

    straight = fit(tmp_path / "straight", 5, hooks=[(1, note)])
    judges = [seen[step][0]["adversary"]["a"]["kernel"] for step in range(1, 6)]
    np.testing.assert_array_equal(judges[START - 1], judges[0])  # no weight decay either
    assert abs(judges[START] - judges[0]).min() > 1e-3
    moved = [seen[step][0]["network"]["encoder"]["kernel"] for step in (1, 2)]
    assert abs(moved[1] - moved[0]).min() > 1e-3
    assert abs(seen[5][0]["network"]["encoder"]["kernel"]).max() < 10

    fit(tmp_path / "stopped", 2)
    resumed = fit(tmp_path / "stopped", 5)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, straight.opt_state)
    average, step = restore_ema(tmp_path / "stopped", "ema")
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, average, straight.ema["ema"])
