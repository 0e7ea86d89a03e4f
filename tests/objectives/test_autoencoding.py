"""With a linear autoencoder and a linear discriminator, whose gradients are done by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import ema
from diffusion.models.autoencoder import Gaussian
from diffusion.models.discriminator import hinge, vanilla
from diffusion.objectives import distances
from diffusion.objectives.kl_autoencoder import Adversary, Autoencoding
from diffusion.objectives.objective import Context
from diffusion.runs.restore import restore_ema
from diffusion.training import loop, optimizers, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

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
    adversary=Adversary(
        LinearDiscriminator(),
        optimizers.make("adamw", 0.05, weight_decay=0.1).tx,
        weight=0.7,
        start=START,
    ),
)


def batch_of(step):
    x = np.random.default_rng(step).normal(size=SHAPE).astype(np.float32)
    return {"x": x, "index": np.arange(BATCH, dtype=np.int32)}


X = batch_of(0)["x"]
PARAMS = OBJECTIVE.init(jax.random.key(0), {"x": X})
JUDGE = OBJECTIVE.extra(jax.random.key(0), {"x": X})["params"]


def by_hand():
    """y, and the gradients of nll and of the adversarial term with respect to the last kernel."""
    encoder = np.asarray(PARAMS["network"]["encoder"]["kernel"], np.float64)
    decoder = np.asarray(PARAMS["network"]["decoder"]["conv_out"]["kernel"], np.float64)
    z = X.astype(np.float64) @ encoder
    y = z @ decoder
    d_nll = np.einsum("bhwi,bhwj->ij", z, 2 * (y - X) / X.size)
    a = np.asarray(JUDGE["a"]["kernel"], np.float64).reshape(SHAPE[1:])
    d_unreal = -np.einsum("bhwi,hwj->ij", z, a) / BATCH
    return y, d_nll, d_unreal


@jax.jit
def gradient(step):
    """Of the autoencoder's and the adversary's parameters, and the metrics."""

    def losses(both):
        return OBJECTIVE.losses(both, Context(step=step), batch_of(0), jax.random.key(1))

    return jax.grad(losses, has_aux=True)((PARAMS, JUDGE))


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_kernel():
    (grads, _), metrics = gradient(START)
    y, d_nll, d_unreal = by_hand()
    weight = np.linalg.norm(d_nll) / (np.linalg.norm(d_unreal) + 1e-4)
    np.testing.assert_allclose(metrics["adaptive_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["reconstruction"], ((y - X) ** 2).mean(), rtol=1e-5)
    kernel = grads["network"]["decoder"]["conv_out"]["kernel"]
    np.testing.assert_allclose(kernel, d_nll + 0.7 * weight * d_unreal, rtol=1e-4, atol=1e-6)


def test_the_discriminator_only_learns_its_own_loss():
    """The hinge's gradient: of real images below 1, of reconstructions above -1."""
    (_, grads), metrics = gradient(START)
    y = by_hand()[0].reshape(BATCH, -1)
    a = np.asarray(JUDGE["a"]["kernel"], np.float64)
    x = X.reshape(BATCH, -1)
    real, fake = x @ a, y @ a
    wanted = 0.5 * ((fake > -1) * y - (real < 1) * x).mean(0)
    np.testing.assert_allclose(grads["a"]["kernel"][:, 0], wanted, atol=1e-5)
    own = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    np.testing.assert_allclose(metrics["adversary"], own, rtol=1e-5)


def test_before_its_start_the_adversary_does_nothing():
    (grads, judges), metrics = gradient(START - 1)
    _, d_nll, _ = by_hand()
    kernel = grads["network"]["decoder"]["conv_out"]["kernel"]
    np.testing.assert_allclose(kernel, d_nll, rtol=1e-4, atol=1e-6)
    assert all(not leaf.any() for leaf in jax.tree.leaves(judges))
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
            lambda p: objective.loss(p, Context(), batch, jax.random.key(0)), has_aux=True
        )
    )(params)
    error = ((by_hand()[0] - X) ** 2).mean()
    np.testing.assert_allclose(grads["log_variance"], 1 - error, rtol=1e-4)
    kl = objective.encode(params, X).kl().mean() / X[0].size
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(loss, error + 0.5 * kl, rtol=1e-5)


SGD = optimizers.make("sgd", 0.05, b1=0.0)
PLAIN = dataclasses.replace(
    OBJECTIVE,
    adversary=dataclasses.replace(OBJECTIVE.adversary, tx=optax.sgd(0.05), start=1),
)


def copies(step, poison=None):
    """Each piece of the batch is the same, so that the adaptive weights of all pieces are too."""
    x = np.tile(np.random.default_rng(step).normal(size=(1, *SHAPE[1:])), (8, 1, 1, 1))
    if step == poison:
        x[3] = np.nan
    return {"x": x.astype(np.float32), "index": np.arange(8, dtype=np.int32)}


def trained(layout="pmap", devices=1, accumulate=1, steps=3, poison=None):
    place = parallel.make(layout, jax.devices()[:devices])
    emas = {"ema": ema.constant(0.9)}
    state = create(PLAIN, SGD, emas, jax.random.key(0), copies(0))
    state = parallel.place(place, state)
    settings = {"accumulate": accumulate, "parallel": layout, "devices": jax.devices()[:devices]}
    step = make_train_step(PLAIN, SGD, emas, **settings)
    for i in range(steps):
        batch = parallel.place_batch(place, copies(i, poison))
        state, metrics = step(state, None, batch, jax.random.key(1))
    return state, metrics


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


def test_devices_pieces_and_layouts_train_both_networks_alike(monkeypatch):
    one = trained()
    start = OBJECTIVE.extra(jax.random.key(0), copies(0))["params"]["a"]["kernel"]
    assert abs(one[0].extra["params"]["a"]["kernel"] - start).max() > 1e-3
    assert "a" not in one[0].params and set(one[0].ema["ema"]) == {"network"}
    for settings in ({"accumulate": 2}, {"devices": 4, "accumulate": 2}):
        assert_close(one, trained(**settings))
    monkeypatch.setattr(parallel, "SMALL", 1)
    state, metrics = trained("fsdp", devices=4)
    assert_close(one, (state, metrics))
    shards = state.extra["params"]["a"]["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(3, 1)}  # of 12


def test_a_step_that_is_not_finite_changes_neither_network():
    before, fine = trained(steps=2)
    after, metrics = trained(steps=3, poison=2)
    assert float(fine["finite"]) == 1 and float(metrics["finite"]) == 0
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=3), after)


def test_each_optimiser_makes_its_own_update():
    """A step of SGD of each, with the gradients that are checked above."""
    state = create(PLAIN, SGD, {}, jax.random.key(0), batch_of(0)).replace(step=jnp.int32(START))
    expected = jax.tree.map(np.array, (state.params, state.extra["params"]))
    new, _ = make_train_step(PLAIN, SGD, {}, devices=jax.devices()[:1])(
        state, None, batch_of(0), jax.random.key(1)
    )
    # The latents' noise is too faint to see, so that the key does not matter.
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, expected, gradient(START)[0])
    assert_close((new.params, new.extra["params"]), expected)


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
    settings = dict(
        objective=OBJECTIVE,
        optimizer=optimizers.make("adamw", 0.05, weight_decay=0.1),
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
        seen[step] = jax.tree.map(np.array, (state.params, state.extra))

    straight = fit(tmp_path / "straight", 5, hooks=[(1, note)])
    judges = [seen[step][1]["params"]["a"]["kernel"] for step in range(1, 6)]
    np.testing.assert_array_equal(judges[START - 1], judges[0])  # no weight decay either
    assert abs(judges[START] - judges[0]).min() > 1e-3
    moved = [seen[step][0]["network"]["encoder"]["kernel"] for step in (1, 2)]
    assert abs(moved[1] - moved[0]).min() > 1e-3
    assert abs(seen[5][0]["network"]["encoder"]["kernel"]).max() < 10

    fit(tmp_path / "stopped", 4)  # within the adversary's training
    resumed = fit(tmp_path / "stopped", 5)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    average, step = restore_ema(tmp_path / "stopped", "ema")
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, average, straight.ema["ema"])
